"""A finished (or running) run as it lies on disk, read into arrays.

``runs/NAME/`` holds ``metrics.jsonl``, ``config.yaml`` and ``plan.txt``. Curves are kept over
tokens, never over steps: two runs with other batch sizes meet on that axis alone.

A step that was skipped because its loss or gradients were not finite is no point of a curve where its
loss is no number: the weights are those of the step before. What happened to a run is counted beside it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fp4pretrain.errors import UserError
from fp4pretrain.observe import DECIDED, HAPPENED, read_rows

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Curve:
    """One measured quantity over tokens: two arrays [rows], tokens strictly increasing."""

    tokens: FloatArray
    values: FloatArray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Run:
    """One run's record. A quantity that it never logged has an empty curve.

    ``events``: how often it skipped a step, went back, hung, ...
    """

    name: str
    path: Path
    config: dict[str, Any]
    plan: str | None
    unigram_entropy: float | None
    loss: Curve
    val_loss: Curve
    val_loss_bf16: Curve
    tokens_per_second: Curve
    events: dict[str, int]


def load_run(path: Path, *, name: str) -> Run:
    """Read one run directory.

    Raises ``UserError`` where the directory, its metrics or its config is missing, or where no
    training loss has been logged yet.
    """
    metrics = path / "metrics.jsonl"
    config = path / "config.yaml"
    if not path.is_dir():
        raise UserError(f"{path}: no such run; give the run_dir of a run")
    for file in (metrics, config):
        if not file.is_file():
            raise UserError(f"{path}: no {file.name}; give the run_dir that a run wrote")
    rows, events = _measured(read_rows(metrics))
    loss = _curve(rows, "loss")
    if not len(loss):
        raise UserError(f"{metrics}: no training loss in it yet; wait for the run's first steps")
    plan = path / "plan.txt"
    return Run(
        name=name,
        path=path,
        config=yaml.safe_load(config.read_text(encoding="utf-8")) or {},
        plan=plan.read_text(encoding="utf-8") if plan.is_file() else None,
        unigram_entropy=_unigram_entropy(path),
        loss=loss,
        val_loss=_curve(rows, "val_loss"),
        val_loss_bf16=_curve(rows, "val_loss_bf16"),
        tokens_per_second=_curve(rows, "tokens_per_second"),
        events=events,
    )


def _measured(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows that are points of curves, and how many there are of each other kind."""
    record = DECIDED | HAPPENED
    skipped = {row["step"] for row in rows if row.get("event") == "skipped"}
    points = [
        row
        for row in rows
        if row.get("event") not in record
        and (row.get("step") not in skipped or math.isfinite(row.get("loss", 0.0)))
    ]
    return points, Counter(row["event"] for row in rows if row.get("event") in record)


def _unigram_entropy(path: Path) -> float | None:
    """Of the run's validation text, nats a token; None for a run that did not say."""
    file = path / "data.json"
    return json.loads(file.read_bytes())["unigram_entropy"] if file.is_file() else None


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({one[-depth:] for one in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def _curve(rows: Sequence[dict[str, Any]], key: str) -> Curve:
    points = {row["tokens"]: row[key] for row in rows if row.get(key) is not None}
    tokens = sorted(points)
    return Curve(
        np.array(tokens, dtype=np.float64),
        np.array([points[token] for token in tokens], dtype=np.float64),
    )
