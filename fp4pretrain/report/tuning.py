"""The learning rate of each recipe, tuned before recipes are compared.

A recipe may like another learning rate than its baseline, so a comparison at one rate is that of the
rate too. Where the runs of a recipe have several ``optim.lr``, those of the best are compared. Three
points and a parabola over log(lr) say where the lowest loss would be; a best rate at the edge of
those tried says that the lowest was not enclosed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp4pretrain.report.differences import RATE, differences
from fp4pretrain.report.seeds import Pool


@dataclass(frozen=True)
class Tuning:
    """``rates`` ascending, ``losses`` the mean final validation (else training) loss at each.

    ``lowest``: the rate and loss of the parabola's vertex; None where the best is at the edge.
    """

    name: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    best: float
    lowest: tuple[float, float] | None

    @property
    def edge(self) -> str | None:
        """``lowest`` or ``highest`` where the best rate is at that end of those tried."""
        ends = {self.rates[-1]: "highest", self.rates[0]: "lowest"}
        return ends.get(self.best)


def tuned(pools: Sequence[Pool]) -> tuple[list[Pool], dict[str, Tuning]]:
    """One pool for each recipe, at its best rate, in the order of the first ones; and how it was chosen,
    by the pool's name, for those that have several rates."""
    families: list[list[Pool]] = []
    for pool in pools:
        family = next((f for f in families if _same_but_rate(pool, f)), None)
        if family is None:
            families.append([pool])
        else:
            family.append(pool)
    chosen, found = [], {}
    for family in families:
        if len(family) == 1:
            chosen.append(family[0])
            continue
        family.sort(key=rate_of)
        losses = _losses(family)
        best = int(np.argmin(losses))
        chosen.append(family[best])
        rates = [rate_of(pool) for pool in family]
        found[family[best].run.name] = Tuning(
            family[best].run.name, tuple(rates), tuple(losses), rates[best],
            _vertex(rates, losses, best),
        )  # fmt: skip
    return chosen, found


def rate_of(pool: Pool) -> float:
    """The pool's learning rate."""
    return float(pool.first.config["optim"]["lr"])


def _same_but_rate(pool: Pool, family: Sequence[Pool]) -> bool:
    keys = {one.key for one in differences(pool.first, family[0].first)}
    changed = pool.first.changes or family[0].first.changes
    return keys == {RATE} and not changed and rate_of(pool) not in map(rate_of, family)


def _losses(family: Sequence[Pool]) -> list[float]:
    """Mean losses over the seeds that every rate has, if there are any. A loss that is not finite counts
    as the worst."""
    shared = set.intersection(*(set(pool.seeds) for pool in family))
    found = []
    for pool in family:
        runs = [run for key, run in pool.seeds.items() if not shared or key in shared]
        ends = [(run.val_loss if len(run.val_loss) else run.loss).values[-1] for run in runs]
        found.append(float(np.mean(ends)) if np.isfinite(ends).all() else math.inf)
    return found


def _vertex(
    rates: Sequence[float], losses: Sequence[float], best: int
) -> tuple[float, float] | None:
    """Of the parabola over log(lr) through the best point and its neighbours."""
    near = losses[best - 1 : best + 2] if best > 0 else []
    if len(near) < 3 or not all(map(math.isfinite, near)):
        return None
    a, b, c = np.polyfit(np.log(rates[best - 1 : best + 2]) - math.log(rates[best]), near, 2)
    if a <= 0:
        return None  # three equal losses
    return rates[best] * math.exp(-b / (2 * a)), float(c - b**2 / (4 * a))
