"""One loss of one recipe against the baseline's: the gap, its interval, and what may be said of it.

The interval's source decides what it covers:

- ``seeds``: Student's t over pairs of runs of one seed. It covers all that differs between pairs.
- ``noise``: a single pair, with the standard deviation of one run that ``fp4pretrain noise`` measured;
  a gap has the noise of two runs. It covers what the replicates differed in.
- ``text``: a single pair, from the paired losses on the parts of the validation set. It covers which
  text was held out, and not the seed's noise, which may be larger: such a gap stays undecided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fp4pretrain.report.gap import match
from fp4pretrain.report.load import Curve, Parts, Run
from fp4pretrain.report.student import Interval, around, interval, pairs_needed

Pair = tuple[Run, Run]  # the recipe's run, the baseline's
BEHIND, AHEAD, UNDECIDED = "behind", "ahead", "undecided"
_RISEN = 1.1  # times the lowest smoothed loss that a run had
_FEWEST_ROWS = 8  # in such a mean, where a run has twice as many: single batches differ by a tenth
_FAR = 0.2  # above the baseline: ten times what the worst recipe of the literature loses
_FEWEST_PARTS = 8


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's final validation loss, relative, and its degrees of freedom."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Gap:
    """``loss`` in nats a token; ``gap`` relative (0.01 is 1%) and ``nats``, means over ``pairs``.

    ``relative`` and ``absolute`` are their intervals, None where there is no source for one.
    """

    loss: float
    gap: float
    nats: float
    pairs: tuple[float, ...]
    relative: Interval | None = None
    absolute: Interval | None = None
    source: str | None = None
    deviation: float | None = None  # of one pair's gap, relative

    @property
    def verdict(self) -> str:
        """Whether the recipe is behind its baseline, ahead of it, or undecided."""
        if self.source not in ("seeds", "noise") or self.relative is None:
            return UNDECIDED
        return BEHIND if self.relative.low > 0 else AHEAD if self.relative.high < 0 else UNDECIDED

    @property
    def more_seeds(self) -> int | None:
        """Pairs to add so that such a gap would be seen in 8 of 10 cases; 0 where it is decided, None
        where nothing is known of the spread or it would take more than ``student.MANY``."""
        if self.verdict != UNDECIDED:
            return 0
        if self.deviation is None or not math.isfinite(self.gap):
            return None
        needed = pairs_needed(self.gap, self.deviation)
        return None if needed is None else max(1, needed - len(self.pairs))

    @property
    def hopeless(self) -> bool:
        """Whether the spread is known and more than ``student.MANY`` pairs would be needed."""
        return self.deviation is not None and self.more_seeds is None and math.isfinite(self.gap)


def measure(pairs: Sequence[Pair], name: str, *, window: int, noise: Noise | None) -> Gap | None:
    """The gap in one curve (``loss``, ``val_loss``, ``val_loss_bf16``) at the last common tokens.

    None where a pair has no common tokens in it.
    """
    smoothing = window if name == "loss" else 1
    found = []
    for run, baseline in pairs:
        matched = match(curve_of(run, name), curve_of(baseline, name), window=smoothing)
        if matched is None:
            return None
        found.append((matched.run[-1], matched.baseline[-1], matched.tokens[-1]))
    ours, theirs = np.array([one[:2] for one in found]).T
    gaps, nats = ours / theirs - 1, ours - theirs
    gap = Gap(
        float(ours.mean()), float(gaps.mean()), float(nats.mean()), tuple(float(g) for g in gaps)
    )
    if len(pairs) > 1:
        relative, absolute = interval(list(gaps)), interval(list(nats))
        if relative is None:
            return gap
        deviation = float(np.std(gaps, ddof=1))
        return replace(
            gap, relative=relative, absolute=absolute, source="seeds", deviation=deviation
        )
    if not math.isfinite(gap.gap) or name == "loss":
        return gap
    if noise is not None:
        error = math.sqrt(2) * noise.deviation
        relative = around(gap.gap, error, freedom=noise.freedom)
        absolute = around(gap.nats, error * float(theirs[0]), freedom=noise.freedom)
        return replace(gap, relative=relative, absolute=absolute, source="noise", deviation=error)
    absolute = _from_text(pairs[0], name, tokens=found[0][2], nats=gap.nats)
    if absolute is None:
        return gap
    error = absolute.half / float(theirs[0])
    relative = Interval(gap.gap, gap.gap - error, gap.gap + error)
    return replace(gap, relative=relative, absolute=absolute, source="text")


def curve_of(run: Run, name: str) -> Curve:
    """A run that quantizes nothing is its own evaluation in BF16."""
    curve: Curve = getattr(run, name)
    if name == "val_loss_bf16" and not len(curve) and not quantized(run):
        return run.val_loss
    return curve


def quantized(run: Run) -> bool:
    """Whether any operand of the run's recipe has another format than BF16."""

    def formats(node: Any) -> list[str]:
        if not isinstance(node, Mapping):
            return []
        own = [str(node["format"])] if "format" in node else []
        return own + [one for value in node.values() for one in formats(value)]

    return any(one != "bf16" for one in formats(run.config.get("precision")))


def diverged(run: Run, baseline: Run | None, *, window: int) -> bool:
    """Whether a run ended without a number, a tenth above the lowest loss that it had had, or a fifth
    above its baseline."""
    losses = run.loss.values
    # Means of equally many rows: the lowest single row of a short run is a lucky batch.
    width = max(min(window, len(losses)), min(_FEWEST_ROWS, -(-len(losses) // 2)))
    means = sliding_window_view(losses, width).mean(axis=-1)
    last = [means[-1], *(c.values[-1] for c in (run.val_loss, run.val_loss_bf16) if len(c))]
    if not np.isfinite(last).all() or means[-1] > _RISEN * means[np.isfinite(means)].min():
        return True
    matched = None if baseline is None else match(run.loss, baseline.loss, window=window)
    return matched is not None and bool(matched.gap[-1] > _FAR)


def _from_text(pair: Pair, name: str, *, tokens: float, nats: float) -> Interval | None:
    """From the spread of the paired differences over the parts of the validation set."""
    ours, theirs = (_parts_of(run, name) for run in pair)
    if ours is None or theirs is None or len(ours.values) != len(theirs.values):
        return None
    if not ours.tokens == theirs.tokens == tokens or len(ours.values) < _FEWEST_PARTS:
        return None
    found = interval(list(ours.values - theirs.values))
    return None if found is None else Interval(nats, nats - found.half, nats + found.half)


def _parts_of(run: Run, name: str) -> Parts | None:
    found = run.val_parts.get(name)
    if found is None and name == "val_loss_bf16" and not quantized(run):
        return run.val_parts.get("val_loss")
    return found
