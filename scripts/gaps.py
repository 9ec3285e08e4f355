"""Loss gaps of recipes over seeds, on all GPUs of a machine or on its CPU, within a time budget.

usage: python scripts/gaps.py --data PREFIX --out FOLDER [--minutes 55] [--jobs 4] [--seeds 1,2,3]
                              [--recipes bf16,nvfp4,...] [--sum-orders 3] [key=value ...]

Trains recipes x seeds of model=gpt_10m (or another model=...), and of BF16 with the first seed the other
orders of sums, --jobs runs at once on each GPU, seed by seed, so that a cut-off grid has whole pairs. When
the time is over, runs save and stop; the same command goes on from there. What is finished is compared:
compare.json, compare.txt and compare.png in FOLDER, noise.json of the orders of sums.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.observe import read_rows
from fp4pretrain.report import measure_noise

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
    "checkpoint.interval=300 checkpoint.keep_last=1 checkpoint.at_end=false"
).split()
EVALUATIONS = 8  # of a run: those near its end are close enough to read tokens to equal loss from
WINDING_UP = 75  # seconds kept for saving and comparing
SAVING = 60  # seconds that a stopped run may take


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


def finished(folder: Path) -> bool:
    """Whether the run's last evaluation is in its rows."""
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not (config.is_file() and metrics.is_file()):
        return False
    steps = yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"]
    return any(row.get("step") == steps and "val_loss" in row for row in read_rows(metrics))


class Machine:
    """Runs jobs on every GPU, ``each`` at once, or on the CPU."""

    def __init__(self, out: Path, common: list[str], *, each: int) -> None:
        gpus = [str(n) for n in range(torch.cuda.device_count())] or [""]
        self._free = [gpu for _ in range(each) for gpu in gpus]  # GPUs in turn
        cores = len(os.sched_getaffinity(0))
        self._threads = max(1, cores // len(self._free))
        self._out, self._common = out, common
        self._running: dict[subprocess.Popen[bytes], tuple[Job, str]] = {}
        self.failed: list[str] = []

    def work(self, jobs: list[Job], *, until: float) -> None:
        """Start jobs in their order until all have ended or the time (time.monotonic) is over."""
        waiting = list(jobs)
        try:
            while (waiting or self._running) and time.monotonic() < until:
                while waiting and self._free:
                    self._start(waiting.pop(0), self._free.pop(0))
                time.sleep(0.5)
                self._collect(stopping=False)
        finally:
            self._stop()

    def _start(self, job: Job, gpu: str) -> None:
        log = self._out / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": gpu,
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": str(self._threads),
        }
        command = [
            *(sys.executable, "-m", "fp4pretrain", "train", *job.overrides, *self._common),
            f"run_dir='{self._out / 'runs' / job.name}'",
        ]
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        self._running[process] = job, gpu
        say(f"started {job.name} on {f'GPU {gpu}' if gpu else 'the CPU'}")

    def _collect(self, *, stopping: bool) -> None:
        for process in [one for one in self._running if one.poll() is not None]:
            job, gpu = self._running.pop(process)
            self._free.append(gpu)
            if finished(self._out / "runs" / job.name):
                say(f"finished {job.name}")
            elif not stopping:
                self.failed.append(job.name)
                lines = (self._out / "logs" / f"{job.name}.log").read_text().splitlines()
                say(f"FAILED {job.name} (status {process.returncode}): {lines[-1:]}")

    def _stop(self) -> None:
        """Let every run save and leave."""
        if self._running:
            say(f"time is over: {len(self._running)} runs save and stop")
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + SAVING
        while self._running and time.monotonic() < end:
            time.sleep(0.5)
            self._collect(stopping=True)
        for process in self._running:
            process.kill()


def compare(out: Path, jobs: list[Job]) -> None:
    """Compare what is finished with BF16, and measure the noise of the orders of sums."""
    done = [out / "runs" / job.name for job in jobs if finished(out / "runs" / job.name)]
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
    left = [job for job in jobs if not finished(out / "runs" / job.name)]
    say(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished, {len(left)} are left")
    machine = Machine(out, common, each=arguments.jobs)
    machine.work(left, until=began + 60 * arguments.minutes - WINDING_UP)
    compare(out, jobs)
    left = [job.name for job in jobs if not finished(out / "runs" / job.name)]
    say(
        f"{len(left)} runs are left" + (f", {len(machine.failed)} failed" if machine.failed else "")
    )
    return 1 if machine.failed else 0


if __name__ == "__main__":
    sys.exit(main())
