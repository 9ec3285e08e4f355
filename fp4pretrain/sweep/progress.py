"""``run 3 of 8`` and the time left, on the main rank's console."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from fp4pretrain.config import RunConfig
from fp4pretrain.model.memory import parameters_of_stage
from fp4pretrain.sweep.planning import Planned
from fp4pretrain.train.checkpoint.saving import step_of
from fp4pretrain.train.run_dir import find_checkpoint


class Progress:
    """Counts the runs of a command; the time left is that of the work left, at the pace so far.

    Work is tokens x parameters, so a short first run does not make the estimate too short. ``total``: all
    runs of the command, with those that need nothing more (finished before, or refused). ``at_once``: runs
    that go on beside each other.
    """

    def __init__(
        self,
        runs: Sequence[Planned],
        *,
        total: int,
        say: Callable[[str], None],
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = {run.path: _work(run) for run in runs}
        self._waiting = dict(self._work)
        self._total, self._number = total, total - len(runs)
        self._say, self._at_once, self._clock = say, at_once, clock
        self._lock = threading.Lock()  # runs of several threads start and end
        self._started: dict[Path, float] = {}
        self._done = self._seconds = 0.0

    def start(self, run: Planned) -> None:
        """Say that a run starts."""
        with self._lock:
            self._number += 1
            self._started[run.path] = self._clock()
            self._say(f"run {self._number} of {self._total}: {run.path}  eta {self._left()}")

    def end(self, run: Planned) -> None:
        """Count a run that ended, however it did."""
        with self._lock:
            self._seconds += self._clock() - self._started.pop(run.path)
            self._done += self._waiting.pop(run.path)

    def _left(self) -> str:
        """The work of all runs that have not ended."""
        if not self._done:
            return "?"
        seconds = self._seconds / self._done * sum(self._waiting.values())
        return str(timedelta(seconds=round(seconds / self._at_once)))


def _work(run: Planned) -> float:
    config = run.config
    found = find_checkpoint(run.path, config) if config.resume else None
    done = 0 if found is None else step_of(found) or 0
    left = max(1, config.train.steps - done)
    return float(left * config.train.global_batch * config.model.seq_length * _parameters(config))


def _parameters(config: RunConfig) -> int:
    stages = config.parallel.pipeline
    return sum(parameters_of_stage(config, n) for n in range(stages)) * config.parallel.tensor
