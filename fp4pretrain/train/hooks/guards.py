"""NaN, Inf and loss spikes are counted; where they last, the run goes back to a checkpoint and passes over
their data.

The optimizer has left out a step that is not finite already (``guard.update``). Here it is logged, and
with the losses it decides (``guard.decisions``) whether the run goes back (``guard.rollback``): to the newest
checkpoint from before the trouble, its schedule and noise with it, but onto data that it has not seen.
Every rank sees the same numbers and decides alike.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from fp4pretrain.errors import UserError
from fp4pretrain.observe.sink import STOPPED
from fp4pretrain.train.guard import rollback
from fp4pretrain.train.guard.decisions import GuardMemory, LossTrack, not_finite, observe, trouble
from fp4pretrain.train.guard.rollback import Entry
from fp4pretrain.train.hooks.checkpointing import Checkpointing
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.run_dir import CHECKPOINTS, on_main
from fp4pretrain.train.trainer import Trainer

_KEY = "guard"


class Guard(Hook):
    """Comes before all hooks that log, evaluate or save a step, since it may undo the step.

    Adds ``skipped_steps`` to the step's row. Raises UserError where it gives up.
    """

    def __init__(self, run: Path, logging: Logging, checkpointing: Checkpointing) -> None:
        self._run = run
        self._logging = logging
        self._checkpointing = checkpointing
        self._memory = GuardMemory()

    def start(self, trainer: Trainer) -> None:
        self._memory = GuardMemory.restored(trainer.memory.get(_KEY))
        if trainer.step == 0:
            return
        found: list[Entry | None] = [None]

        def read() -> None:
            found[0] = rollback.entry_for(
                self._run, step=trainer.step, rollbacks=self._memory.rollbacks
            )

        on_main(read, is_main=trainer.world.is_main)
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            self._go_on_from(trainer, found[0])

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        settings, memory = trainer.config.guard, self._memory
        skips = 0 < settings.max_skipped <= memory.streak + 1
        spike = (
            settings.spike.action != "none" and memory.losses.above + 1 >= settings.spike.patience
        )
        return not skips and not spike  # whatever the step's numbers are

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        settings = trainer.config.guard
        before = self._memory
        self._remember(trainer, observe(before, row, settings))
        row["skipped_steps"] = self._memory.skipped_steps
        reason = not_finite(row)
        if reason is not None:
            self._log(trainer, "skipped", count=self._memory.skipped_steps, reason=reason)
        found = trouble(self._memory, settings)
        if found == "skipped":
            self._go_back(trainer, row, found)
        elif found == "spike":
            spikes = self._memory.spikes + 1
            self._log(
                trainer,
                "spike",
                count=spikes,
                loss=row["loss"],
                mean=before.losses.mean,
                deviation=math.sqrt(before.losses.variance),
                since=before.good_step + 1,
            )
            self._remember(trainer, replace(self._memory, spikes=spikes))
            if settings.spike.action == "rollback":
                self._go_back(trainer, row, found)
            else:
                self._learn_anew(trainer)

    def _go_back(self, trainer: Trainer, row: dict[str, Any], reason: str) -> None:
        """To the newest checkpoint that is good, onto data after what was read and skip_batches."""
        memory, reached, tokens = self._memory, trainer.step, trainer.tokens
        self._checkpointing.wait(trainer)
        if memory.rollbacks >= trainer.config.guard.max_rollbacks:
            self._stop(
                trainer,
                row,
                f"guard.max_rollbacks: {_what(memory, reason)} up to step {reached}, after "
                f"{memory.rollbacks} rollbacks; lower optim.lr or look at the data, then continue "
                "with resume=auto and a larger guard.max_rollbacks",
            )
        position = trainer.consumed_samples
        position += trainer.config.guard.skip_batches * trainer.config.train.global_batch
        loaded = rollback.load_good(
            trainer,
            self._run / CHECKPOINTS,
            good_step=memory.good_step,
            say=partial(_warn, is_main=trainer.world.is_main),
        )
        if loaded is None:
            self._nowhere_to_go(trainer, row, reason)
            return
        passed = position - trainer.consumed_samples
        entry = Entry(
            rollbacks=memory.rollbacks + 1,
            from_step=reached,
            to_step=trainer.step,
            consumed_samples=position,
            skipped_samples=trainer.skipped_samples + passed,
            memory=replace(
                GuardMemory.restored(trainer.memory.get(_KEY)),
                skipped_steps=memory.skipped_steps,
                spikes=memory.spikes,
                rollbacks=memory.rollbacks + 1,
                streak=0,
            ).stored(),
        )
        self._logging.write(
            {
                "event": "rollback",
                "step": reached,
                "tokens": tokens,
                "count": entry.rollbacks,
                "reason": reason,
                "to_step": trainer.step,
                "passed_over_samples": passed,
            }
        )
        if trainer.world.is_main:
            rollback.record(self._run, entry)
        self._go_on_from(trainer, entry)

    def _nowhere_to_go(self, trainer: Trainer, row: dict[str, Any], reason: str) -> None:
        """Without a checkpoint to go back to: a spike is ignored; after too many NaN steps in a row the
        weights are saved and the run stops."""
        if reason == "spike":
            self._learn_anew(trainer)
            return
        what = _what(self._memory, reason)
        # the steps left out changed nothing: what is saved is the state before them
        self._remember(trainer, replace(self._memory, streak=0, good_step=trainer.step))
        self._checkpointing.begin(trainer)
        self._checkpointing.wait(trainer)
        saved = f"the state before them is saved as {self._checkpointing.path}"
        if self._checkpointing.failed is not None:
            saved = "the state before them could not be saved"
        self._stop(
            trainer,
            row,
            f"guard.max_skipped: {what} up to step {trainer.step}, and there is no checkpoint to go "
            f"back to; {saved}: lower optim.lr or look at the data, set checkpoint.interval, and "
            "continue with resume=auto",
        )

    def _go_on_from(self, trainer: Trainer, entry: Entry) -> None:
        trainer.consumed_samples = entry.consumed_samples
        trainer.skipped_samples = entry.skipped_samples
        self._remember(trainer, GuardMemory.restored(entry.memory))

    def _learn_anew(self, trainer: Trainer) -> None:
        """Start mean and deviation of the losses anew, from the losses of now."""
        self._remember(trainer, replace(self._memory, losses=LossTrack(), good_step=trainer.step))

    def _remember(self, trainer: Trainer, memory: GuardMemory) -> None:
        self._memory = memory
        trainer.memory[_KEY] = memory.stored()

    def _log(self, trainer: Trainer, event: str, **values: Any) -> None:
        self._logging.write(
            {"event": event, "step": trainer.step, "tokens": trainer.tokens, **values}
        )

    def _stop(self, trainer: Trainer, row: dict[str, Any], line: str) -> NoReturn:
        self._logging.write(row)  # no other hook will see this step
        self._log(trainer, STOPPED, reason=line)
        raise UserError(line)


def _what(memory: GuardMemory, reason: str) -> str:
    if reason == "spike":
        return f"a loss spike since step {memory.good_step + 1}"
    return f"{memory.streak} steps in a row were not finite"


def _warn(text: str, *, is_main: bool) -> None:
    if is_main:
        print(f"warning: {text}", flush=True)
