"""A checkpoint every ``checkpoint.interval`` steps and at the end of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp4pretrain.train.checkpoint import save
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer


class Checkpointing(Hook):
    """Saves into ``folder``; after evaluation, so that a resumed run repeats no row."""

    def __init__(self, folder: Path, logging: Logging) -> None:
        self._folder = folder
        self._logging = logging

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        settings = trainer.config.checkpoint
        last = trainer.step == trainer.config.train.steps and settings.at_end
        due = settings.interval > 0 and trainer.step % settings.interval == 0
        if last or due:
            with self._logging.throughput.paused():
                save(trainer, self._folder, keep_last=settings.keep_last)
