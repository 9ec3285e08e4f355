"""A finished (or running) run as it lies on disk, read into arrays.

``runs/NAME/`` holds ``metrics.jsonl``, ``config.yaml`` and ``plan.txt``. Curves are kept over
tokens, never over steps: two runs with other batch sizes meet on that axis alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fp4pretrain.errors import UserError
from fp4pretrain.observe import read_rows

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
    """One run's record. A quantity that it never logged has an empty curve."""

    name: str
    path: Path
    config: dict[str, Any]
    plan: str | None
    unigram_entropy: float | None
    loss: Curve
    val_loss: Curve
    val_loss_bf16: Curve
    tokens_per_second: Curve


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
    rows = read_rows(metrics)
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
    )


def _unigram_entropy(path: Path) -> float | None:
    """Of the run's validation text, nats a token; None for a run that did not say."""
    file = path / "data.json"
    return json.loads(file.read_text())["unigram_entropy"] if file.is_file() else None


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
