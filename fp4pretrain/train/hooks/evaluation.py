"""Held-out loss every ``eval_interval`` steps and at the end: in the run's recipe and in BF16.

The BF16 number tells how much of the gap is in the weights and how much in evaluating them in FP4.
"""

from __future__ import annotations

from typing import Any

from fp4pretrain.report.live import LiveGap
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.step import evaluate
from fp4pretrain.train.trainer import Trainer


class Evaluation(Hook):
    """Evaluates and logs one row: val_loss, and val_loss_bf16 where a recipe quantizes.

    They are of the first validation set; val_loss_parts and val_loss_bf16_parts are of its parts.
    Where data.valid names several, each has val_loss/NAME too. With a ``gap`` (the main rank's, which
    alone has sinks) the row holds the distance to the baseline's loss.
    """

    def __init__(self, logging: Logging, gap: LiveGap | None = None) -> None:
        self._logging = logging
        self._gap = gap

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        train = trainer.config.train
        due = train.eval_interval > 0 and step % train.eval_interval == 0
        return step != train.steps and not due

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self.only_reads(trainer, trainer.step):
            return
        with self._logging.throughput.paused():
            losses = self._losses(trainer)
        gap = {} if self._gap is None else self._gap.at(trainer.tokens, losses)
        self._logging.write(
            {"event": "eval", "step": trainer.step, "tokens": trainer.tokens, **losses, **gap}
        )

    def _losses(self, trainer: Trainer) -> dict[str, Any]:
        names = list(trainer.data.valid)
        endpoints = {"val_loss": False}
        if trainer.config.train.eval_bf16 and trainer.binding.plan.ever_quantized:
            endpoints["val_loss_bf16"] = True
        losses: dict[str, Any] = {}
        for key, bf16 in endpoints.items():
            found = {name: evaluate(trainer, name, bf16=bf16) for name in names}
            losses[key] = found[names[0]].loss
            losses[f"{key}_parts"] = [round(loss, 6) for loss in found[names[0]].parts]
            if len(names) > 1:
                losses |= {f"{key}/{name}": one.loss for name, one in found.items()}
        return losses
