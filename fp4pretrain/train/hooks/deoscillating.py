"""Weights that swing around a rounding boundary are set onto their casts, as the plan says when.

Each reset writes a row ``deoscillation`` with the share of the block weights' elements that were set.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer

EVENT = "deoscillation"


class Deoscillating(Hook):
    """Opens windows, follows weights through them, resets at their end."""

    def __init__(self, logging: Logging) -> None:
        self._logging = logging

    def start(self, trainer: Trainer) -> None:
        self._open(trainer)

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return not trainer.binding.plan.deoscillation

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        plan, paths = trainer.binding.plan.deoscillation, trainer.paths
        if paths.open or plan.opens(trainer.progress):
            trainer.settle()
        if paths.open:
            paths.step()
            if plan.closes(trainer.step):
                counts = paths.reset(trainer.optimizer, ratio=plan.ratio)
                trainer.clock.weights_changed()
                self._tell(trainer, counts)
        self._open(trainer)

    def _open(self, trainer: Trainer) -> None:
        if not trainer.paths.open and trainer.binding.plan.deoscillation.opens(trainer.progress):
            trainer.paths.begin()

    def _tell(self, trainer: Trainer, counts: tuple[int, int]) -> None:
        total = torch.tensor(counts, dtype=torch.float64, device=trainer.world.device)
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        resets, elements = total.tolist()
        self._logging.write(
            {
                "event": EVENT,
                "step": trainer.step,
                "tokens": trainer.tokens,
                "reset_share": resets / elements,
            }
        )
