"""Two random ranks of a run are killed; it goes on from its last checkpoint and ends as if undisturbed."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
from agreeing import MIXED
from lab import Lab, Results, chaos, grid, records

MOMENTS = ("step", "write")  # between two saves, and within one
# As many steps as the kills leave time for: a GPU makes one in about 30 ms.
LENGTH = {
    "cpu": (24, ["train.eval_interval=8", "checkpoint.interval=2"]),
    "cuda": (
        240,
        ["train.eval_interval=80", "checkpoint.interval=10", "train.deterministic=true"],
    ),
}


def kill(lab: Lab, results: Results) -> None:
    """Rows, weights and optimizer state against those of the undisturbed run, bit for bit."""
    name = MIXED[lab.gpus]
    key = f"{name}, {len(MOMENTS)} kills"
    if not results.lacks(key):
        return
    steps, intervals = LENGTH[lab.device]
    run = [
        *chaos.RUN,
        *grid.LAYOUTS[name].overrides,
        *intervals,
        f"train.steps={steps}",
        *lab.extra,
    ]
    run.append(f"parallel.device={lab.device}")
    folder = lab.work / f"kills-{time.time_ns()}"
    whole = folder / "whole"
    folder.mkdir(parents=True)
    # A rank that NCCL keeps waiting for a dead one hears no SIGTERM: torchrun waits this long for it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    began = time.monotonic()

    def started(path: Path) -> chaos.Chaos:
        patience = max(1.0, lab.deadline - time.monotonic())
        return chaos.Chaos(path, whole, size=lab.gpus, seed=lab.gpus, patience=patience)

    killed = started(whole)  # the undisturbed run: started as the other is, and no kill comes
    try:
        killed.train([*run, f"checkpoint.keep_last={steps}"], moments=())
        killed = started(folder / "run")
        killed.train(run, moments=MOMENTS)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        results.add(key, {"failed": f"{killed.summary()}\n{error}"})
        return
    results.add(
        key,
        {
            "same_rows": records.curve(killed.run) == records.curve(whole),
            "same_state": _same_bits(whole, killed.run, steps),
            "left_over": killed.left_over(),
            "kills": killed.summary(),
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    shutil.rmtree(folder)


def _same_bits(whole: Path, run: Path, steps: int) -> bool:
    last = f"checkpoints/step_{steps:08d}"
    one, other = records.weights(whole / last), records.weights(run / last)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
