"""Loss gaps of recipes over seeds, on all GPUs of a machine or on its CPU, within a time budget.

usage: python scripts/gaps.py --data PREFIX --out FOLDER [--minutes 55] [--jobs 4] [--seeds 1,2,3]
                              [--recipes bf16,nvfp4,...] [--sum-orders 3] [key=value ...]

Trains recipes x seeds of model=gpt_10m (or another model=...), and of BF16 with the first seed the other
orders of sums, --jobs runs at once on each GPU, seed by seed, so that a cut-off grid has whole pairs
(sweep.launcher=processes does the work). When the time is over, runs save and stop; the same command goes
on from there. What is finished is compared: compare.json, compare.txt and compare.png in FOLDER,
noise.json of the orders of sums.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.report import measure_noise
from fp4pretrain.sweep import train_all

ROTATIONS = [f"precision.{gemm}.rotation.kind=none" for gemm in ("fprop", "dgrad", "wgrad")]
RECIPES = {
    "bf16": ["precision=bf16"],
    "fp8": ["precision=fp8"],
    "nvfp4": ["precision=nvfp4"],
    "nvfp4_all": [
        "precision=nvfp4",
        "precision.keep.first_blocks=0",
        "precision.keep.last_blocks=0",
    ],
    "mxfp4_h16": ["precision=mxfp4_h16"],
    "mxfp4_plain": ["precision=mxfp4_h16", *ROTATIONS],
}
RUN = (
    "model=gpt_10m logging=quiet train.log_interval=50 data.valid_tokens=1M resume=auto "
    "checkpoint.interval=300 checkpoint.keep_last=1 checkpoint.at_end=false sweep.launcher=processes"
).split()
EVALUATIONS = 8  # of a run: those near its end are close enough to read tokens to equal loss from
WINDING_UP = 75  # seconds kept for saving and comparing


@dataclass(frozen=True)
class Job:
    """One run of the grid: its folder's name, and its overrides without what all runs have."""

    name: str
    overrides: list[str]


def grid(recipes: list[str], seeds: list[int], sum_orders: int) -> list[Job]:
    """All runs in their order: seed by seed, other orders of sums after the first seed's."""
    jobs = []
    for number, seed in enumerate(seeds):
        jobs += [
            Job(f"{name}-seed{seed}", [*RECIPES[name], f"precision.name={name}", f"seed={seed}"])
            for name in recipes
        ]
        if number == 0:
            jobs += [
                Job(
                    f"bf16-seed{seed}-sums{order}",
                    ["precision=bf16", f"seed={seed}", f"train.sum_order={order}"],
                )
                for order in range(1, sum_orders)
            ]
    return jobs


def compare(out: Path, done: list[Path]) -> None:
    """Compare what is finished with BF16, and measure the noise of the orders of sums."""
    sums = [path for path in done if "-sums" in path.name]
    if sums:
        first = out / "runs" / sums[0].name.partition("-sums")[0]
        if first in done:
            noise = measure_noise({"sums": [first, *sums]})
            (out / "noise.json").write_text(json.dumps(noise, indent=1) + "\n")
            level = noise["levels"][0]
            say(
                f"{level['runs']} orders of sums: SD {100 * level['deviation']:.3f}%, "
                f"{level['nats']:.4f} nats"
            )
    runs = [path for path in done if path not in sums]
    bases = [path for path in runs if path.name.startswith("bf16-")]
    if not bases or len(runs) == len(bases):
        say("nothing to compare yet: it takes a finished BF16 run and another recipe's")
        return
    command = [
        *(sys.executable, "-m", "fp4pretrain", "compare", *map(str, runs)),
        *("--baseline", str(bases[0]), "--out", str(out / "compare.png")),
    ]
    environment = os.environ | {"COLUMNS": "80"}
    for options, file in ((["--json"], "compare.json"), (["--html"], "compare.txt")):
        ended = subprocess.run(
            [*command, *options], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        (out / file).write_text(ended.stdout)
    print(ended.stdout, flush=True)


def say(text: str) -> None:
    """One line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", metavar="PREFIX", help="default: data.path as the config has it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--jobs", type=int, default=4, help="runs at once on a GPU")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--sum-orders", type=int, default=3, help="runs of BF16 and the first seed")
    arguments, overrides = parser.parse_known_args()
    common = [*RUN, *([f"data.path='{arguments.data}'"] if arguments.data else []), *overrides]
    out = arguments.out.absolute()
    jobs = grid(
        arguments.recipes.split(","),
        [int(s) for s in arguments.seeds.split(",")],
        arguments.sum_orders,
    )
    try:
        steps = {job.name: compose([*job.overrides, *common]).train.steps for job in jobs}
    except UserError as error:
        parser.error(str(error))
    interval = -(-max(steps.values()) // EVALUATIONS)
    common.insert(len(RUN), f"train.eval_interval={interval}")
    seconds = max(1, 60 * arguments.minutes - WINDING_UP - (time.monotonic() - began))
    sweep = [f"sweep.jobs={arguments.jobs}", f"sweep.budget={seconds:.0f}s"]
    runs = [
        [*job.overrides, *common, f"run_dir='{out / 'runs' / job.name}'", *sweep] for job in jobs
    ]
    try:
        outcomes = train_all(runs, compared=False)
    except UserError as error:
        parser.error(str(error))
    done = [one.run.path for one in outcomes if one.run is not None and one.state == "finished"]
    compare(out, done)
    failed = sum(one.state == "failed" for one in outcomes)
    say(f"{len(jobs) - len(done)} runs are left" + (f", {failed} failed" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
