"""A finished (or running) run as it lies on disk, read into arrays.

``runs/NAME/`` holds ``metrics.jsonl``, ``config.yaml`` and ``plan.txt``. Curves are kept over
tokens, never over steps: two runs with other batch sizes meet on that axis alone.

A run that was resumed as another experiment says so in its history: ``changes``.

A step that was skipped (its loss or gradients were not finite) changed no weights. Where its loss is not
finite it is left out of the curves. Such events are counted beside them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import within
from fp4pretrain.observe import DECIDED, HAPPENED
from fp4pretrain.report.rows import POINTS, FloatArray, Rows, block_ends, block_means, read

OBSERVATIONS = 40  # of each run, evenly spaced
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML has it
ENDPOINTS = ("val_loss", "val_loss_bf16")
_CHANGE = re.compile(r"(?:^|, )([a-z_]+(?:\.[a-z_0-9]+)*): ")
_LENGTH = ("train.steps", "optim.warmup", "optim.decay")


@dataclass(frozen=True)
class Curve:
    """One measured quantity over tokens: two arrays [rows], tokens strictly increasing."""

    tokens: FloatArray
    values: FloatArray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Parts:
    """Losses of the parts of a validation set [parts], nats a token, and the tokens trained on then."""

    tokens: float
    values: FloatArray


@dataclass(frozen=True, eq=False)
class Run:
    """One run's record, equal to itself alone. A quantity that it never logged has an empty curve.

    ``val_parts``: of the last evaluation, by the name of its curve. ``fingerprint``: of what shapes
    the curve (``fp4pretrain.fingerprint``); None for a run that left none. ``changes``: key -> what
    it was and became, where the run was resumed as another experiment. ``events``: how often it
    skipped a step, went back, hung, ...; ``happened``: (tokens, event) of each. ``thinned``: how many
    logged rows a point of ``loss`` is the mean of. ``lr``, ``grad_norm``: of sampled rows.
    ``observed``: rows of observers, at most ``OBSERVATIONS``. ``starts``: the history's, and ``last``
    the step and time (seconds since 1970; None where unknown) of the last row.
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
    val_parts: dict[str, Parts]
    fingerprint: dict[str, Any] | None
    changes: dict[str, str]
    events: dict[str, int]
    thinned: int = 1
    lr: Curve = field(default_factory=lambda: Curve(np.zeros(0), np.zeros(0)))
    grad_norm: Curve = field(default_factory=lambda: Curve(np.zeros(0), np.zeros(0)))
    happened: tuple[tuple[float, str], ...] = ()
    observed: tuple[dict[str, Any], ...] = ()
    starts: tuple[dict[str, Any], ...] = ()
    last: tuple[int, float | None] = (0, None)

    @property
    def steps(self) -> int | None:
        """The length that the run was given; None where its config does not say."""
        return (self.config.get("train") or {}).get("steps")


def load_run(path: Path, *, name: str) -> Run:
    """Read one run directory.

    Raises ``UserError`` where its metrics or its config is missing or not a run's, or where no
    training loss has been logged yet.
    """
    metrics = path / "metrics.jsonl"
    config = path / "config.yaml"
    for file in (metrics, config):
        if not file.is_file():
            raise UserError(f"{path}: no {file.name}; give the run_dir that a run wrote")
    found = read(metrics)
    rows, events = _measured(found.others)
    if any("tokens" not in row for row in rows if "loss" in row or "val_loss" in row):
        raise UserError(f"{metrics}: rows without tokens, on which runs meet; rerun the run")
    loss, thinned = _losses(found, rows)
    rows = [*found.samples, *rows]
    if not len(loss):
        raise UserError(f"{metrics}: no training loss in it yet; wait for the run's first steps")
    plan = path / "plan.txt"
    tree = _mapping(config)
    return Run(
        name=name,
        path=path,
        config=tree,
        plan=plan.read_text(encoding="utf-8") if plan.is_file() else None,
        unigram_entropy=_unigram_entropy(path),
        loss=loss,
        val_loss=_curve(rows, "val_loss"),
        val_loss_bf16=_curve(rows, "val_loss_bf16"),
        tokens_per_second=_curve(rows, "tokens_per_second"),
        val_parts={key: one for key in ENDPOINTS if (one := _parts(rows, key)) is not None},
        fingerprint=_fingerprint(path),
        changes=_changes(path, tree),
        events=events,
        thinned=thinned,
        lr=_curve(rows, "lr"),
        grad_norm=_curve(rows, "grad_norm"),
        happened=tuple(
            (float(row.get("tokens", math.nan)), str(row["event"]))
            for row in found.others
            if row.get("event") in DECIDED | HAPPENED
        ),
        observed=tuple(_few([row for row in found.others if row.get("event") == "observe"])),
        starts=tuple(_history(path)),
        last=_last([*found.samples, *found.others]),
    )


def _losses(found: Rows, rows: Sequence[dict[str, Any]]) -> tuple[Curve, int]:
    """The training loss over tokens, and how many rows a point is the mean of. A step that was skipped and
    whose loss is not finite is left out, since it changed no weights."""
    skipped = [row["step"] for row in found.others if row.get("event") == "skipped"]
    stays = np.isfinite(found.losses) | ~np.isin(found.steps, skipped)
    other = _curve(rows, "loss")  # rows in another form than a run's own
    tokens = np.concatenate([found.tokens[stays], other.tokens])
    losses = np.concatenate([found.losses[stays], other.values])
    tokens, last = np.unique(tokens[::-1], return_index=True)  # of two rows the later one
    losses = losses[::-1][last]
    size = max(1, -(-len(tokens) // POINTS))
    return Curve(block_ends(tokens, size), block_means(losses, size)), size


def _few(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    if len(rows) <= OBSERVATIONS:
        return rows
    return [rows[int(index)] for index in np.linspace(0, len(rows) - 1, OBSERVATIONS)]


def _last(rows: Sequence[dict[str, Any]]) -> tuple[int, float | None]:
    last = max(rows, key=lambda row: row.get("step", -1))
    return int(last.get("step", 0)), last.get("time")


def _history(path: Path) -> list[dict[str, Any]]:
    file = path / "history.json"
    if not file.is_file():
        return []
    try:
        starts: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["starts"]
    except (ValueError, KeyError):
        raise UserError(f"{file}: it is damaged; delete it") from None
    return starts


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


def _mapping(config: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(config.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{config}: not a run's config; give the run_dir that a run wrote")
    return tree


def _fingerprint(path: Path) -> dict[str, Any] | None:
    file = path / "fingerprint.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _changes(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Key -> "was -> became" over all starts. A run that was only made longer is what it would have
    been, unless that had to be allowed by name."""
    found: dict[str, str] = {}
    for start in _history(path):
        pieces = _CHANGE.split(start.get("changes") or "")  # "", key, change, key, change, ...
        found |= dict(zip(pieces[1::2], pieces[2::2], strict=True))
    named = config.get("resume_with") or []
    return {k: v for k, v in found.items() if k not in _LENGTH or within(k, named)}


def _parts(rows: Sequence[dict[str, Any]], key: str) -> Parts | None:
    """Of the last evaluation, if it has them."""
    last = next((row for row in reversed(rows) if row.get(key) is not None), None)
    values = None if last is None else last.get(f"{key}_parts")
    if last is None or values is None:
        return None
    return Parts(last["tokens"], np.array(values, dtype=np.float64))


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
