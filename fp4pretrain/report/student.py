"""Student's t: intervals of a mean, the power of a paired test, and how many pairs it takes.

Everything here is two-sided at 10%: an interval of 90%, and a verdict where it leaves out zero. The
two distributions are integrated numerically; the tests hold them to published tables and to draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.9
POWER = 0.8
MANY = 100  # pairs; a gap that takes more is not worth the number
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of ``LEVEL``."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of independent values; None for fewer than two, or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return around(float(np.mean(values)), error, freedom=len(values) - 1)


def around(mean: float, error: float, *, freedom: int) -> Interval:
    """The interval of a mean whose standard error was estimated with so many degrees of freedom."""
    half = quantile(freedom) * error
    return Interval(mean, mean - half, mean + half)


@cache
def quantile(freedom: int) -> float:
    """The t that a Student variable exceeds in magnitude with probability ``1 - LEVEL``."""
    # With x = sqrt(freedom) tan(a) the density becomes cos(a)^(freedom - 1): smooth on a finite range.
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def inside(t: float) -> float:
        end = math.atan(t / math.sqrt(freedom))
        angles = end * (_NODES + 1) / 2
        return float(scale * end * (_WEIGHTS * np.cos(angles) ** (freedom - 1)).sum())

    return _crossing(inside, LEVEL, high=1000.0)


def power(shift: float, pairs: int) -> float:
    """Probability that a paired test of n ``pairs`` sees a gap, on the side where it is.

    ``shift``: the gap in standard deviations of one pair's gap.
    """
    freedom, centre = pairs - 1, shift * math.sqrt(pairs)
    # Over s = sqrt(chi^2 / freedom), the estimated over the true deviation: P(z > t s - centre).
    spread = 10 / math.sqrt(2 * freedom)
    low, high = max(1e-9, 1 - spread), 1 + spread
    s = low + (high - low) * (_NODES + 1) / 2
    log_density = (
        math.log(2)
        + freedom / 2 * math.log(freedom / 2)
        - math.lgamma(freedom / 2)
        + (freedom - 1) * np.log(s)
        - freedom * s**2 / 2
    )
    seen = np.array([_normal(centre - quantile(freedom) * one) for one in s])
    return float(((high - low) / 2 * _WEIGHTS * np.exp(log_density) * seen).sum())


@cache
def visible(pairs: int) -> float:
    """The gap that n pairs see with probability ``POWER``, in standard deviations of a pair's gap."""
    return _crossing(lambda shift: power(shift, pairs), POWER, high=1000.0)


def visible_of_runs(pairs: int) -> float:
    """The same in standard deviations of one run: a gap has the noise of two, sqrt(2) of it.

    An upper bound where the runs of a pair share some of their noise: 3.3 for 3 pairs, 1.7 for 6.
    """
    return math.sqrt(2) * visible(pairs)


def pairs_needed(gap: float, deviation: float) -> int | None:
    """Pairs that would see such a gap with probability ``POWER``; None for more than ``MANY``.

    ``deviation``: the standard deviation of one pair's gap.
    """
    return next((n for n in range(2, MANY + 1) if visible(n) * deviation <= abs(gap)), None)


def _normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _crossing(rising, level: float, *, high: float) -> float:  # type: ignore[no-untyped-def]
    """Where an increasing function of x >= 0 passes a level, by bisection."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2
