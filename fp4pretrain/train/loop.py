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

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After a step; ``row`` has event, step, tokens, loss, grad_norm, lr."""

    def close(self) -> None:
        """Always, also after an error: let go of files."""


def fit(trainer: Trainer, hooks: Sequence[Hook]) -> None:
    """Train from ``trainer.step`` to ``train.steps``, or until a hook sets ``trainer.stopped``.

    The recipe of every linear is set before each step, so a plan may switch at any of them.
    """
    try:
        for hook in hooks:
            hook.start(trainer)
        iterators = trainer.batches(trainer.train_data, trainer.consumed_samples)
        while trainer.step < trainer.config.train.steps and not trainer.stopped:
            switched = trainer.binding.apply(trainer.progress)
            row: dict[str, Any] = train_step(trainer, iterators)
            row = {"event": "train", "step": trainer.step, "tokens": trainer.tokens, **row}
            if switched:
                row["recipe_switched"] = True
            for hook in hooks:
                hook.after_step(trainer, row)
    finally:
        for hook in hooks:
            hook.close()
