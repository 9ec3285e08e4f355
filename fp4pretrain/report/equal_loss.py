"""How many more tokens a recipe needs for its baseline's loss, as arXiv 2509.25149 and 2605.09825 tell a gap.

Read from the validation curves. A recipe that is behind ends, at T tokens, with a loss that the
baseline had at T' < T: it needs T / T' - 1 more tokens. One that is ahead had the baseline's last loss
at T': T' / T - 1, which is negative. Between two evaluations the loss is a line over the logarithm of
tokens. Both runs' learning rates fall at the end, so a loss is reached later than by a run whose
schedule ended there: the number is that of these curves, and smaller than of tuned lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp4pretrain.report.endpoint import Pair
from fp4pretrain.report.gap import match
from fp4pretrain.report.load import Curve
from fp4pretrain.report.student import Interval, interval

_WIDEST = 1.25  # tokens of neighbouring evaluations between which a line may be drawn


@dataclass(frozen=True)
class EqualLoss:
    """``extra`` tokens as a fraction (0.08: 8% more), mean over pairs, with its interval; or ``why``
    it cannot be read."""

    extra: float | None
    interval: Interval | None = None
    why: str | None = None


def equal_loss(pairs: Sequence[Pair]) -> EqualLoss:
    """The mean over all pairs. Where one pair cannot be read, the result says why and has no number."""
    found: list[float] = []
    for run, baseline in pairs:
        one = _extra(run.val_loss, baseline.val_loss)
        if isinstance(one, str):
            return EqualLoss(None, why=one)
        found.append(one)
    return EqualLoss(float(np.mean(found)), interval(found))


def _extra(run: Curve, baseline: Curve) -> float | str:
    matched = match(run, baseline)
    if matched is None:
        return "there are no validation losses at common tokens"
    end, ours, theirs = matched.tokens[-1], matched.run[-1], matched.baseline[-1]
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return "a run diverged"
    reached = _reached(baseline if ours >= theirs else run, max(ours, theirs), end=float(end))
    if isinstance(reached, str):
        return reached
    return float(end) / reached - 1 if ours >= theirs else reached / float(end) - 1


def _reached(curve: Curve, level: float, *, end: float) -> float | str:
    """Tokens at which a curve came down to a loss for good, up to ``end``."""
    inside = curve.tokens <= end
    tokens, values = curve.tokens[inside], curve.values[inside]
    above = np.flatnonzero(~(values <= level))
    if not len(above):
        return "the loss was reached before the first evaluation"
    last = above[-1]
    if last + 1 == len(tokens):
        return "the curve does not come down to the loss"
    left, right = tokens[last], tokens[last + 1]
    if values[last + 1] == level:
        return float(right)
    if right > _WIDEST * left:
        return "evaluations are too far apart there; lower train.eval_interval"
    part = (values[last] - level) / (values[last] - values[last + 1])
    return float(math.exp(math.log(left) + part * (math.log(right) - math.log(left))))
