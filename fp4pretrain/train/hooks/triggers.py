"""Rules that begin and end on what the run measures: counted on the main rank, known to all.

After each step the main rank has the step's loss and, where they were made, the evaluation's gap and
the observers' ratio of gradient to noise. It decides which triggers fire and tells the other ranks. What
is remembered is in the trainer's memory, so a resumed run goes on as if it had not stopped; a switch
takes effect with the next step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from fp4pretrain.precision import Rule
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import TRIGGERS, Trainer

_WINDOW = 32  # losses before a step's that loss_ratio compares it with


class Triggers(Hook):
    """Writes one row ``trigger`` (rule, what fired or released it, the measured value) per change."""

    def __init__(self, logging: Logging) -> None:
        self._logging = logging
        self._measured: dict[str, float] = {}
        logging.listen(self._hear)

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return not _triggered(trainer)

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        rules = _triggered(trainer)
        if not rules:
            return
        found: list[Any] = [None]
        if trainer.world.is_main:
            memory = remembered(trainer.memory)
            changes = self._decide(rules, memory, float(row["loss"]))
            found = [(memory, changes)]
        if trainer.world.size > 1:
            dist.broadcast_object_list(found, src=0)
        trainer.memory[TRIGGERS], changes = found[0]
        for change in changes:
            self._logging.write(
                {"event": "trigger", "step": trainer.step, "tokens": trainer.tokens, **change}
            )

    def _hear(self, row: Mapping[str, Any]) -> None:
        if row["event"] == "eval" and "gap" in row:
            self._measured["gap"] = row["gap"]
        ratios = [v for k, v in row.items() if k.startswith("observe/gradient_to_noise/")]
        if ratios:
            self._measured["gradient_to_noise"] = statistics.fmean(ratios) / math.sqrt(3)

    def _decide(
        self, rules: list[Rule], memory: dict[str, Any], loss: float
    ) -> list[dict[str, Any]]:
        """Count this step's measurements in ``memory``; the changes that follow."""
        losses = memory["losses"]
        measured, self._measured = self._measured, {}
        if len(losses) == _WINDOW:
            measured["loss_ratio"] = loss / statistics.fmean(losses)
        if math.isfinite(loss):
            memory["losses"] = [*losses, loss][-_WINDOW:]
        changes = []
        for rule in rules:
            fired = rule.name in memory["fired"]
            condition = rule.release if fired else rule.trigger
            if condition is None or condition.quantity not in measured:
                continue
            value = measured[condition.quantity]
            count = memory["counts"].get(rule.name, 0) + 1 if condition.holds(value) else 0
            memory["counts"][rule.name] = count % condition.count
            if count < condition.count:
                continue
            names = set(memory["fired"]) ^ {rule.name}
            memory["fired"] = sorted(names)
            changes.append(
                {"rule": rule.name, "holds": not fired, "why": str(condition), "value": value}
            )
        return changes


def _triggered(trainer: Trainer) -> list[Rule]:
    return [rule for rule in trainer.binding.plan.ordered if rule.trigger is not None]


def remembered(memory: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what a run's memory holds about triggers."""
    found = memory.get(TRIGGERS, {})
    return {
        "fired": list(found.get("fired", ())),
        "counts": dict(found.get("counts", {})),
        "losses": list(found.get("losses", ())),
    }
