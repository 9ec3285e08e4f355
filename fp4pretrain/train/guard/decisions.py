"""When a run is in trouble: decisions from numbers, with no tensors and no files.

Two kinds of trouble have one response, to go back to the last good checkpoint and pass over the data
in between. PaLM (arXiv:2204.02311, section 5.1) did so by hand, about 20 times: a checkpoint from 100
steps before the spike, 200 to 500 batches passed over; the same batches did no harm to other weights.

- Steps that are not finite, ``guard.max_skipped`` in a row. One alone is only skipped.
- A loss spike: ``patience`` losses in a row above mean + ``threshold`` standard deviations. OLMo 2
  (arXiv:2501.00656) counts losses seven standard deviations from a rolling average; a single one
  mostly mends itself, so here several in a row are needed. Losses above the limit do not change mean and
  deviation.

Everything here is JSON in the checkpoint, so a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fp4pretrain.config import GuardConfig, SpikeConfig


def not_finite(row: Mapping[str, Any]) -> str | None:
    """Which of a step's loss and grad_norm is not finite; None where both are."""
    bad = [key for key in ("loss", "grad_norm") if not math.isfinite(row[key])]
    return " and ".join(bad) or None


@dataclass(frozen=True)
class LossTrack:
    """Mean and variance of the losses so far, and how many of the last ones were ``above`` them."""

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    above: int = 0


def follow(track: LossTrack, loss: float, rule: SpikeConfig) -> LossTrack:
    """The track after one more finite loss; a spike where its ``above`` reaches ``rule.patience``.

    Mean and variance are plain over the first ``window`` / 2 losses, and exponential averages after them.
    """
    limit = track.mean + rule.threshold * math.sqrt(track.variance)
    if track.seen >= rule.warmup and loss > limit:
        return replace(track, above=track.above + 1)
    weight = max(1 / (track.seen + 1), 2 / (rule.window + 1))
    delta = loss - track.mean
    variance = (1 - weight) * (track.variance + weight * delta**2)
    return LossTrack(track.seen + 1, track.mean + weight * delta, variance)


@dataclass(frozen=True)
class GuardMemory:
    """What the guard knows of a run. ``good_step``: the last step that was finite and, as far as is known,
    not part of a spike. Counts cover the whole run, rolled-back steps included."""

    skipped_steps: int = 0
    spikes: int = 0
    rollbacks: int = 0
    streak: int = 0
    good_step: int = 0
    losses: LossTrack = LossTrack()

    @classmethod
    def restored(cls, stored: Mapping[str, Any] | None) -> GuardMemory:
        """The memory of a checkpoint's JSON; a new one where there is none."""
        if stored is None:
            return cls()
        return cls(**{**stored, "losses": LossTrack(**stored["losses"])})

    def stored(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def observe(memory: GuardMemory, row: Mapping[str, Any], settings: GuardConfig) -> GuardMemory:
    """The memory after a step with ``row``'s step, loss and grad_norm."""
    if not_finite(row):
        return replace(memory, skipped_steps=memory.skipped_steps + 1, streak=memory.streak + 1)
    losses = memory.losses
    if settings.spike.action != "none":
        losses = follow(losses, row["loss"], settings.spike)
    good = memory.good_step if losses.above else row["step"]
    return replace(memory, streak=0, good_step=good, losses=losses)


def trouble(memory: GuardMemory, settings: GuardConfig) -> str | None:
    """``skipped`` or ``spike`` where this step calls for a rollback, otherwise None."""
    if 0 < settings.max_skipped <= memory.streak:
        return "skipped"
    if memory.losses.above >= settings.spike.patience:
        return "spike"
    return None
