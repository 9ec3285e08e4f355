"""Whether the run did what its plan says: casts and products by format, counted at their sites."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fp4pretrain.audit import audit, done
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer


class Auditing(Hook):
    """Writes ``audit.json``: at the start what each linear computes, at the end of the process what all
    ranks cast and multiplied since then, by format.

    Raises:
        UserError: at the end, on every rank, where a site was cast otherwise than its recipes said.
            The run's checkpoints are written by then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said: dict[str, Any] = {}
        self._steps = 0

    def start(self, trainer: Trainer) -> None:
        chosen = trainer.backend, trainer.backend_choice
        self._said = audit(trainer.config, trainer.world.device, chosen=chosen)
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            with suppress(OSError):  # a full disk ends no run
                write_text(self._path, json.dumps(self._said, indent=1) + "\n")

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._steps += 1

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return True

    def end(self, trainer: Trainer) -> None:
        if not self._steps:
            return
        mine = done(trainer.binding)
        found: list[Any] = [mine]
        if trainer.world.size > 1:
            found = [None] * trainer.world.size
            dist.all_gather_object(found, mine)
        casts: Counter[str] = Counter()
        products: Counter[str] = Counter()
        wrong: list[str] = []
        for theirs, multiplied, clauses in found:
            casts.update(theirs)
            products.update(multiplied)
            wrong += clauses
        self._said["done"] = {
            "steps": self._steps,
            "casts": dict(sorted(casts.items())),
            "products": dict(sorted(products.items())),
        }
        self._write(trainer)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"precision: the run did otherwise than its plan: {'; '.join(wrong[:3])}{more}; report this "
                f"with {self._path}"
            )
