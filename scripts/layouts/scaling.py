"""Speed of whole training steps on n GPUs beside one, through the front door, with one step profiled.

strong: the batch of one GPU; weak: that batch for each rank of data parallelism. Every GPU trains one GPU's
run, and the slowest of them counts: ranks wait for the slowest, and cards of a kind differ by a few percent.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from lab import Lab, Results, Task, grid

# gpt_6_7b's widths; all 32 layers with their optimizer take 120 GB
MODELS = {
    "gpt_6_7b": ["model=gpt_6_7b", "model.num_layers=8"],
    "gpt_1_3b": ["model=gpt_1_3b"],
    "tiny": [*grid.MODEL],  # for CPUs: shows that the script works, and nothing else
}
RUN = (
    "data.mock=true data.valid_tokens=256 train.steps=9 train.log_interval=1 train.eval_interval=0 "
    "train.eval_bf16=false profile.start=8 profile.steps=1 checkpoint.at_end=false "
    "logging.wandb.mode=disabled logging.console=quiet"
).split()
TIMED = (5, 6, 7)  # after compiling, capturing and warming up, before the profiled step
# Of one GPU's tokens/s, for each GPU: what the issue asks of DP 8, TP 4 and TP 2 x PP 2 x DP 2.
AIMS = {"DP": 7.7 / 8, "TP 4": 3.2 / 4, "TP 2 x PP 2": 6.4 / 8}
# What is measured first where the time may not last.
ORDER = (
    ("TP 4", "strong"),
    ("TP 8", "strong"),
    ("TP 2", "strong"),
    ("DP 4", "weak"),
    ("DP 8", "weak"),
    ("DP 2", "weak"),
    ("TP 2 x PP 2", "strong"),
    ("TP 2 x PP 2 x DP 2 + SP", "weak"),
    ("PP 4 interleaved", "strong"),
    ("PP 2 interleaved", "strong"),
    ("DP 4", "strong"),
    ("DP 8", "strong"),
    ("DP 2", "strong"),
    ("TP 2 x DP 2 + SP", "weak"),
    ("TP 2 x PP 2 x DP 2 + SP", "strong"),
    ("TP 4 + SP", "strong"),
    ("TP 2 + SP", "strong"),
    ("TP 2 x DP 2 + SP", "strong"),
)


def scale(
    lab: Lab,
    results: Results,
    *,
    models: list[str],
    recipes: list[str],
    layouts: list[str],
    batch: tuple[int, int],
) -> None:
    """One row for each model, recipe, layout and kind; ``batch``: one GPU's, and of a microbatch."""
    order = [(grid.ONE, "strong"), *(one for one in ORDER if one[0] in layouts)]
    tasks = [
        task_of(lab.work, lab.device, f"{model}, {recipe}, {layout}, {kind}", batch=batch)
        for layout, kind in order
        for model in models
        for recipe in recipes
        if results.lacks(f"{model}, {recipe}, {layout}, {kind}")
        for _ in range(lab.gpus if layout == grid.ONE else 1)
    ]
    measured: set[str] = set()
    for task, reply in lab.run(tasks):
        model, recipe, layout, kind = task.key.split(", ")
        row = {"model": model, "recipe": recipe, "layout": layout, "kind": kind}
        if "failed" in reply:
            results.add(task.key, row | reply)
            continue
        path = Path(reply["path"])
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        row["batch"] = batch[0] * (grid.LAYOUTS[layout].data if kind == "weak" else 1)
        row |= summary([json.loads(line) for line in lines])
        row |= {"seconds": reply["seconds"], "left_gib": reply["left"] / 2**30}
        before = results.rows[task.key] if task.key in measured else row
        if before.get("tokens_per_second", 0.0) >= row["tokens_per_second"]:
            results.add(task.key, row)
        measured.add(task.key)
        shutil.rmtree(path)  # traces of all ranks are tens of MB


def task_of(work: Path, device: str, key: str, *, batch: tuple[int, int]) -> Task:
    """The run of one row, whose key is ``model, recipe, layout, kind``."""
    model, recipe, name, kind = key.split(", ")
    layout = grid.LAYOUTS[name]
    whole = batch[0] * (layout.data if kind == "weak" else 1)
    run = [*MODELS[model], *RUN, f"precision={recipe}", f"parallel.device={device}"]
    run += [f"train.global_batch={whole}", f"train.micro_batch={batch[1]}", *layout.overrides]
    folder = work / f"{key}-{time.time_ns()}".replace(", ", "-").replace(" ", "_")
    return Task(key, "train", [*run, f"run_dir={folder}"], size=layout.ranks)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median tokens a second of the timed steps, peak memory, losses, and the profiled step's times."""
    steps = [row for row in rows if row["event"] == "train"]
    profile = next((row for row in rows if row["event"] == "profile"), {})
    timed = [row for row in steps if row["step"] in TIMED]
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in timed),
        "slowest": min(row["tokens_per_second"] for row in timed),
        "mfu": statistics.median(row["mfu"] or 0.0 for row in timed),
        "memory_gib": steps[-1]["memory_gib"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        **{key: value for key, value in profile.items() if key.endswith("_ms")},
    }


def aim(model: str, layout: str, kind: str) -> float | None:
    """Tokens/s aimed at, of one GPU's; None where the issue names no aim."""
    one = grid.LAYOUTS[layout]
    if layout.startswith("DP"):
        share = AIMS["DP"] if kind == "weak" else None
    elif layout.startswith("TP 2 x PP 2"):
        share = AIMS["TP 2 x PP 2"] if kind == "weak" or one.data == 1 else None
    else:
        share = AIMS.get(layout) if model == "gpt_6_7b" else None
    return None if share is None else share * one.ranks
