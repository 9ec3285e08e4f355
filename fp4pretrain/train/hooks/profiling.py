"""A trace of a few steps for every rank, and what of their communication was hidden."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fp4pretrain.observe import overlap
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer


class Profiling(Hook):
    """Records ``profile.steps`` steps after step ``profile.start`` into ``folder/rank_N.json.gz``.

    The traces open in Perfetto or chrome://tracing. The main rank also logs a row of its own GPU's
    compute, communication, hidden, exposed and idle milliseconds a step.
    """

    def __init__(self, folder: Path, logging: Logging) -> None:
        self._folder = folder
        self._logging = logging
        self._profile: profile | None = None

    def start(self, trainer: Trainer) -> None:
        self._begin(trainer)

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        settings = trainer.config.profile
        return settings.steps == 0 or step not in (settings.start, settings.start + settings.steps)

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        settings = trainer.config.profile
        if self._profile is not None and trainer.step == settings.start + settings.steps:
            with self._logging.throughput.paused():
                self._end(trainer)
        self._begin(trainer)

    def after_rollback(self, trainer: Trainer) -> None:
        self.close()  # the steps it was to record come again

    def close(self) -> None:
        if self._profile is not None:  # the run ended inside
            self._profile.stop()
            self._profile = None

    def _begin(self, trainer: Trainer) -> None:
        settings = trainer.config.profile
        if settings.steps == 0 or trainer.step != settings.start:
            return
        activities = [ProfilerActivity.CPU]
        if trainer.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def _end(self, trainer: Trainer) -> None:
        assert self._profile is not None
        on_gpu = trainer.world.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{trainer.world.rank}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        if trainer.world.is_main and on_gpu:
            with gzip.open(path, "rt", encoding="utf-8") as trace:
                times = overlap(json.load(trace)["traceEvents"])
            steps = trainer.config.profile.steps
            self._logging.write(
                {"event": "profile", "step": trainer.step, "tokens": trainer.tokens}
                | {"profiled_steps": steps}
                | {key: time / steps for key, time in times.items()}
            )
