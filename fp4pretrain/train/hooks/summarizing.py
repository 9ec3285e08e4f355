"""The numbers by which finished runs are sorted on a dashboard."""

from __future__ import annotations

import math
from pathlib import Path

from fp4pretrain.audit import flop_categories
from fp4pretrain.errors import UserError
from fp4pretrain.report.gap import steady_rate
from fp4pretrain.report.live import LiveGap
from fp4pretrain.report.load import load_run
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer


class Summarizing(Hook):
    """At the end of a process, from the rows of the whole run: ``final/val_loss``,
    ``final/tokens_per_second`` (the median), with a baseline ``final/gap_percent`` and
    ``final/extra_tokens_percent`` (to its loss), and the audit's shares of the FLOPs,
    ``final/fp4_flops_percent``, ``fp8``, ``bf16``.
    """

    def __init__(self, path: Path, logging: Logging, gap: LiveGap | None) -> None:
        self._path = path
        self._logging = logging
        self._gap = gap

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return True

    def end(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        shares = flop_categories(trainer.binding.plan, trainer.config.model)
        found = {f"{name}_flops_percent": 100 * share for name, share in shares.items()}
        try:
            run = load_run(self._path, name=self._path.name)
        except UserError:  # no row was written: the disk is full
            run = None
        if run is not None:
            rate = steady_rate(run.tokens_per_second)
            if rate is not None:
                found["tokens_per_second"] = rate
            if len(run.val_loss) and math.isfinite(run.val_loss.values[-1]):
                found["val_loss"] = float(run.val_loss.values[-1])
            if self._gap is not None:
                found |= self._gap.final(run)
        self._logging.summarize({f"final/{name}": value for name, value in found.items()})
