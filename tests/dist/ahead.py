"""Which steps of a run were read while the next one had begun."""

from __future__ import annotations

from typing import Any

import pytest

from fp4pretrain.train.hooks import Signals
from fp4pretrain.train.trainer import Trainer


def steps_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of such steps of every run of this process from now on."""
    found: list[int] = []
    after_step = Signals.after_step

    def seen(self: Signals, trainer: Trainer, row: dict[str, Any]) -> None:
        if trainer.begun is not None:
            found.append(trainer.step)
        after_step(self, trainer, row)

    monkeypatch.setattr(Signals, "after_step", seen)
    return found
