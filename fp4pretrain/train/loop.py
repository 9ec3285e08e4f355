"""The loop: one step after another until the run's length, everything else in hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer


class Hook:
    """What happens around the steps. Every rank calls every hook, so a hook may communicate."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step of this process, after a checkpoint is loaded."""

    def before_step(self, trainer: Trainer) -> None:
        """Before every step."""

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After a step; ``row`` has event, step, tokens, loss, grad_norm, lr.

        A hook that takes the trainer back to an earlier step does so on every rank; the hooks after
        it do not see the step that is gone.
        """

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        """Whether ``after_step`` of ``step`` will do nothing but read its row: no collective, nothing of the
        device's, no change of the trainer. Where all hooks say so the device begins the next step before.
        Asked before the step, and answered alike by every rank.
        """
        return False

    def after_rollback(self, trainer: Trainer) -> None:
        """After a hook took the trainer back, to ``trainer.step``."""

    def end(self, trainer: Trainer) -> None:
        """After the last step of this process, unless an error ended it: finish what communicates."""

    def close(self) -> None:
        """Always, also after an error: let go of files."""


def fit(trainer: Trainer, hooks: Sequence[Hook]) -> None:
    """Train from ``trainer.step`` to ``train.steps``, or until a hook sets ``trainer.stopped``.

    The recipe of every linear is set before each step, so a plan may switch at any of them. The data
    is read from ``trainer.consumed_samples`` on, also where a hook has moved that.
    """
    position = -1
    try:
        for hook in hooks:
            hook.start(trainer)
        while trainer.step < trainer.config.train.steps and not trainer.stopped:
            if trainer.consumed_samples != position:
                iterators = trainer.batches(trainer.consumed_samples)
            for hook in hooks:
                hook.before_step(trainer)
            switched = trainer.binding.apply(trainer.progress)
            go_on = all(hook.only_reads(trainer, trainer.step + 1) for hook in hooks)
            row: dict[str, Any] = train_step(trainer, iterators, go_on=go_on)
            row = {"event": "train", "step": trainer.step, "tokens": trainer.tokens, **row}
            if switched:
                row["recipe_switched"] = True
            position = trainer.consumed_samples
            _after_step(trainer, row, hooks)
        for hook in hooks:
            hook.end(trainer)
    finally:
        for hook in hooks:
            hook.close()


def _after_step(trainer: Trainer, row: dict[str, Any], hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        hook.after_step(trainer, row)
        if trainer.step != row["step"]:
            for each in hooks:
                each.after_rollback(trainer)
            return
