"""A checkpoint every ``checkpoint.interval`` steps and at the end of the run, while training goes on.

A save that fails, on a full disk above all, costs a line and a row, never the run: the checkpoints
before it stay, and the next one is tried in its turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp4pretrain.train.checkpoint import Keep, SaveError, Saving, remove_leftovers
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.run_dir import record_saved
from fp4pretrain.train.trainer import Trainer


class Checkpointing(Hook):
    """Saves into ``folder``; after evaluation, so that a resumed run repeats no row.

    ``path`` is the last checkpoint that this process completed, ``failed`` the step of a later one
    that could not be written.
    """

    def __init__(self, folder: Path, logging: Logging) -> None:
        self._folder = folder
        self._logging = logging
        self._saving: Saving | None = None
        self._begun = -1
        self.path: Path | None = None
        self.failed: int | None = None

    def start(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            remove_leftovers(self._folder)

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._begun = -1
        if self._saving is not None and self._saving.finished():
            self.wait(trainer)
        if self._due(trainer, trainer.step):
            self.begin(trainer)
            if not trainer.config.checkpoint.asynchronous:
                self.wait(trainer)

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return self._saving is None and not self._due(trainer, step)

    def _due(self, trainer: Trainer, step: int) -> bool:
        settings = trainer.config.checkpoint
        last = step == trainer.config.train.steps and settings.at_end
        return last or (settings.interval > 0 and step % settings.interval == 0)

    def end(self, trainer: Trainer) -> None:
        self.wait(trainer)
        if self.failed is not None and trainer.world.is_main:
            kept = self.path or "no checkpoint of this process"
            print(
                f"warning: the checkpoint of step {self.failed} is missing; the last one that was "
                f"written is {kept}",
                flush=True,
            )

    def begin(self, trainer: Trainer) -> None:
        """Wait for the save before, then start to save this step, unless it was saved already. Collective."""
        if self._begun == trainer.step:
            return
        self.wait(trainer)
        settings = trainer.config.checkpoint
        with self._logging.throughput.paused():
            self._saving = Saving(
                trainer, self._folder, Keep(settings.keep_last, settings.keep_every)
            )
        self._begun = trainer.step

    def wait(self, trainer: Trainer) -> None:
        """Complete the save under way, if any; a failure is said and logged. Collective."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            with self._logging.throughput.paused():
                self.path = saving.finish()
        except SaveError as error:
            self.failed = saving.step
            self._say(trainer, str(error))
        else:
            self.failed = None
            if trainer.world.is_main:
                record_saved(self._folder.parent, saving.step)

    def _say(self, trainer: Trainer, problem: str) -> None:
        self._logging.write(
            {
                "event": "save_failed",
                "step": trainer.step,
                "tokens": trainer.tokens,
                "problem": problem,
            }
        )
        if trainer.world.is_main:
            print(f"warning: {problem}; training goes on, earlier checkpoints stay", flush=True)
