"""What chance alone does to a loss: standard deviations of replicates, and the gaps that pairs can see."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fp4pretrain.errors import UserError
from fp4pretrain.report.endpoint import Noise
from fp4pretrain.report.load import load_run
from fp4pretrain.report.student import visible_of_runs

_PAIRS = (2, 3, 4, 6, 8, 12)
_TOLD = {
    "sums": "order of sums (train.sum_order)",
    "data": "order of data (data.seed)",
    "weights": "initial weights (seed)",
}


def measure_noise(levels: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Of the final validation loss (training loss without one), as JSON; deviations are fractions.

    ``levels``: what replicates differ in (sums, data, weights) -> their folders. ``deviation`` is
    the largest of them, ``visible`` the gap that n pairs of such runs see (80% power at 10%), an upper
    bound where the two runs of a pair share noise.
    """
    found = [_level(level, paths) for level, paths in levels.items()]
    largest = max(found, key=lambda one: one["deviation"])
    return {
        "levels": found,
        "deviation": largest["deviation"],
        "freedom": largest["runs"] - 1,
        "visible": [{"pairs": n, "gap": visible_of_runs(n) * largest["deviation"]} for n in _PAIRS],
    }


def read_noise(path: Path) -> Noise:
    """What `measure_noise` found, from a file. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        noise = Noise(float(found["deviation"]), int(found["freedom"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"noise: {path} is not what fp4pretrain noise wrote; give its JSON"
        ) from None
    if noise.freedom < 1 or not 0 < noise.deviation < math.inf:
        raise UserError(
            f"noise: {path} holds no standard deviation; measure it with more replicates"
        )
    return noise


def noise_table(found: Mapping[str, Any]) -> Table:
    """For the console."""
    table = Table(title="Noise of the last validation loss", box=SIMPLE_HEAD, pad_edge=False)
    for header in ("replicates differ in", "runs", "mean", "SD %", "SD nats"):
        table.add_column(header, justify="left" if header == "replicates differ in" else "right")
    for one in found["levels"]:
        table.add_row(
            _TOLD[one["level"]], str(one["runs"]), f"{one['mean']:.4f}",
            f"{100 * one['deviation']:.3f}", f"{one['nats']:.4f}",
        )  # fmt: skip
    seen = ", ".join(f"{one['pairs']} pairs {100 * one['gap']:.2f}%" for one in found["visible"])
    table.caption = f"Seen with 80% power at 10%, by the largest SD: {seen}."
    table.caption_justify = "left"
    return table


def _level(level: str, paths: Sequence[Path]) -> dict[str, Any]:
    runs = [load_run(path, name=path.name) for path in paths]
    curves = [run.val_loss if len(run.val_loss) else run.loss for run in runs]
    losses = [float(curve.values[-1]) for curve in curves]
    if not all(map(math.isfinite, losses)):
        bad = next(run for run, loss in zip(runs, losses, strict=True) if not math.isfinite(loss))
        raise UserError(f"{bad.path}: it diverged; lower optim.lr")
    nats, mean = float(np.std(losses, ddof=1)), float(np.mean(losses))
    return {
        "level": level,
        "runs": len(runs),
        "losses": losses,
        "mean": mean,
        "nats": nats,
        "deviation": nats / mean,
    }
