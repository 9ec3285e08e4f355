"""Two GPUs beside one at gpt_1_3b: tokens a second and hidden communication of DP 2, TP 2 and PP 2.

usage: python scripts/layouts.py [--out FOLDER] [--recipes bf16,nvfp4] [--layouts NAME,...] [key=value ...]

A layout whose run is in the folder is not trained again.

Each layout trains a few steps through the front door and profiles one of them. Work a GPU is fixed for
DP 2 (twice the batch), total work for the others, so an ideal speed-up is 2 for all. docs/gpu.md's table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = 32
RUN = (
    "model=gpt_1_3b data.mock=true train.micro_batch=8 train.steps=11 train.eval_interval=0 "
    "data.valid_tokens=256 train.eval_bf16=false profile.start=5 profile.steps=1 "
    "checkpoint.at_end=false logging.wandb.mode=disabled logging.console=lines"
).split()
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {  # ranks, batches of BATCH, overrides
    "one GPU": (1, 1, []),
    "DP 2": (2, 2, []),
    "DP 2 no overlap": (2, 2, ["parallel.overlap=false"]),
    "TP 2": (2, 1, ["parallel.tensor=2"]),
    "TP 2 + SP": (2, 1, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP 2": (2, 1, ["parallel.pipeline=2"]),
    "PP 2 interleaved": (2, 1, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


def train(folder: Path, layout: str, overrides: list[str]) -> list[dict[str, Any]]:
    """The rows of one run; raises CalledProcessError where it fails."""
    ranks, batches, parallel = LAYOUTS[layout]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launch if ranks > 1 else [])]
    run = [*RUN, f"train.global_batch={BATCH * batches}", f"run_dir={folder}", *parallel]
    metrics = folder / "metrics.jsonl"
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ}  # as launch/torchrun.sh does
    training = [*command, "-m", "fp4pretrain", "train", *run, *overrides]
    if not metrics.exists():
        subprocess.run(training, check=True, env=environment)
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second (median of the steps after the profile), loss of step 1, profile."""
    steps = [row for row in rows if row["event"] == "train"]
    profile = next((row for row in rows if row["event"] == "profile"), {})
    rates = [row["tokens_per_second"] for row in steps if row["step"] > 7]
    return {
        "tokens_per_second": statistics.median(rates),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "mfu": steps[-1]["mfu"],
        "memory_gib": steps[-1]["memory_gib"],
        **{key: value for key, value in profile.items() if key.endswith("_ms")},
    }


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: one row a recipe and layout."""
    lines = [
        "| recipe | layout | tokens/s | of the first | first loss | communication | hidden |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, layouts in found.items():
        alone = next(iter(layouts.values()))["tokens_per_second"]
        for name, row in layouts.items():
            told = row.get("communication_ms", 0.0)
            hidden = f"{row['hidden_ms'] / told:.0%}" if told else ""
            lines.append(
                f"| {recipe} | {name} | {row['tokens_per_second']:,.0f} | "
                f"{row['tokens_per_second'] / alone:.2f} | {row['first_loss']:.5f} | "
                f"{f'{told:.0f} ms' if told else ''} | {hidden} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--recipes", default="bf16,nvfp4")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    arguments, overrides = parser.parse_known_args()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for recipe in arguments.recipes.split(","):
        for layout in arguments.layouts.split(","):
            folder = arguments.out / f"{recipe}-{layout}".replace(" ", "_")
            rows = train(folder, layout, [f"precision={recipe}", *overrides])
            found.setdefault(recipe, {})[layout] = summary(rows)
            (arguments.out / "layouts.json").write_text(
                json.dumps(found, indent=1), encoding="utf-8"
            )
        print(table({recipe: found[recipe]}), flush=True)


if __name__ == "__main__":
    main()
