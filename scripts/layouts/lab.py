"""Ranks to run jobs on, a budget of time, and results that are on disk as soon as they are known."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

# The laws, their tolerances, the ranks and the kills are those of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "dist"))

import agreement
import chaos
import grid
import records
from ranks import Ranks

from fp4pretrain.files import write_text

__all__ = [
    "PARTS",
    "Lab",
    "Results",
    "Task",
    "agreement",
    "chaos",
    "grid",
    "parts_of",
    "records",
    "say",
]

PARTS = ("agreement", "checkpoints", "scaling", "kills")


@dataclass(frozen=True)
class Task:
    """A job of ``tests/dist/worker.py`` on ``size`` ranks; ``key`` names its result."""

    key: str
    job: str
    overrides: Sequence[str]
    size: int = 1
    steps: int = 1


class Results:
    """Rows by key in one JSON file, written anew with every row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def lacks(self, key: str) -> bool:
        """Whether it has to be measured: what failed is tried again."""
        return "failed" in self.rows.get(key, {"failed": ""})

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self.rows, indent=1) + "\n")
        say(f"{self._path.stem}: {key}: {_short(row)}")


@dataclass
class Lab:
    """``gpus`` ranks (processes, with ``device`` cpu); ``out`` for results, ``work`` for all else."""

    gpus: int
    device: str
    out: Path
    work: Path
    extra: list[str] = field(default_factory=list)
    deadline: float = 0.0
    pool: Ranks = field(init=False)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        folder = self.work / f"jobs-{time.time_ns()}"
        folder.mkdir()
        self.pool = Ranks(folder, device=self.device)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Each task's reply, or ``{"failed": why}``. Neighbours of one size run side by side, as many as
        there are GPUs for. Ends early where the time is over; what has begun is finished."""
        for size, same in groupby(tasks, key=lambda task: task.size):
            left = list(same)
            while left and time.monotonic() < self.deadline:
                # a job that hangs may not eat the time of the parts after this one
                self.pool.patience = max(90.0, self.deadline - time.monotonic() + 30)
                wave, left = left[: self.gpus // size], left[self.gpus // size :]
                yield from self._wave(wave)

    def _wave(self, wave: list[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        began = time.monotonic()
        jobs = []
        for number, task in enumerate(wave):
            first = number * task.size
            overrides = [*task.overrides, *self.extra]
            jobs.append(
                self.pool.start(task.job, overrides, size=task.size, steps=task.steps, first=first)
            )
        for task, job in zip(wave, jobs, strict=True):
            try:
                reply = self.pool.finish(job)
                if "user_error" in reply:
                    reply = {"failed": reply["user_error"]}
            except AssertionError as error:
                reply = {"failed": str(error)}
            yield task, reply | {"seconds": round(time.monotonic() - began, 1)}


def parts_of(text: str) -> dict[str, float]:
    """{part: seconds}; a part without a number has an hour. Raises ArgumentTypeError."""
    found = {}
    for one in text.split(","):
        name, _, seconds = one.partition(":")
        if name not in PARTS or (not seconds.isdecimal() and seconds):
            raise argparse.ArgumentTypeError(
                f"{one!r}: NAME or NAME:SECONDS, of {', '.join(PARTS)}"
            )
        found[name] = float(seconds or 3600)
    return found


def say(text: str) -> None:
    """One line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _short(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if isinstance(value, (bool, int, float, str))
    )
