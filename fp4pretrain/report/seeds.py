"""Runs of one recipe that differ in their seed, as one result.

A short run orders recipes by chance: the seed alone moves a loss by per cents. So runs whose configs are
equal but for the seed are pooled. Their curves are means; how sure the gap is comes from the pairs: each
run and the baseline's of its own seed saw the same batches, and the standard error is that of their gaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fp4pretrain.errors import UserError
from fp4pretrain.report.differences import differences
from fp4pretrain.report.gap import MatchedCurves
from fp4pretrain.report.load import Curve, FloatArray, Run

SEED = "seed"


@dataclass(frozen=True)
class Pool:
    """``run``: the mean of ``runs`` (by seed, as text), or the only one."""

    run: Run
    runs: Mapping[str, Run]

    @property
    def first(self) -> Run:
        """The run that stands for all where they are equal: config, plan."""
        return next(iter(self.runs.values()))


def alone(run: Run) -> Pool:
    """A run by itself."""
    return Pool(run, {str(run.config.get(SEED)): run})


def pooled(runs: Sequence[Run]) -> list[Pool]:
    """One pool for each recipe, in the order of their first runs; runs of one seed stay apart."""
    groups: list[dict[str, Run]] = []
    for run in runs:
        seed = str(run.config.get(SEED))
        for group in groups:
            if seed not in group and _same_recipe(run, next(iter(group.values()))):
                group[seed] = run
                break
        else:
            groups.append({seed: run})
    names = [_recipe_name(group) for group in groups]
    pools = []
    for name, group in zip(names, groups, strict=True):
        first = next(iter(group.values()))
        if len(group) == 1:
            pools.append(Pool(first, group))
            continue
        shown = name if name and names.count(name) == 1 else first.name
        pools.append(Pool(_mean(list(group.values()), f"{shown} ({len(group)} seeds)"), group))
    return pools


def refuse_unpaired(pools: Sequence[Pool]) -> None:
    """Raise ``UserError`` where there is no baseline, or a seed has no run of the baseline's."""
    base, *others = pools
    if not others:
        raise UserError(
            "runs: all are one recipe with several seeds; add runs of another recipe, or compare "
            "them one by one with --force"
        )
    for pool in others:
        if len(base.runs) == len(pool.runs) == 1:
            continue  # the seed is named among all differences
        odd = sorted(base.runs.keys() ^ pool.runs.keys())
        if odd:
            raise UserError(
                f"seed: {pool.run.name} and the baseline {base.run.name} do not have runs of the "
                f"same seeds ({', '.join(odd)}: one of them only); leave those out or add the others"
            )


def standard_error(pairs: Sequence[MatchedCurves | None], tokens: FloatArray) -> FloatArray | None:
    """Of the mean of the pairs' gaps, on tokens [rows]; None for one pair, or where one has none."""
    found = [pair for pair in pairs if pair is not None]
    if len(found) < 2 or len(found) < len(pairs):
        return None
    gaps = np.stack([np.interp(tokens, pair.tokens, pair.gap) for pair in found])
    error: FloatArray = gaps.std(axis=0, ddof=1) / np.sqrt(len(found))
    return error


def _same_recipe(run: Run, other: Run) -> bool:
    return all(
        one.bookkeeping or one.key == SEED
        for one in differences(run.name, run.config, other.config)
    )


def _recipe_name(group: Mapping[str, Run]) -> str | None:
    precision = next(iter(group.values())).config.get("precision")
    return precision.get("name") if isinstance(precision, Mapping) else None


def _mean(runs: Sequence[Run], name: str) -> Run:
    return replace(
        runs[0],
        name=name,
        loss=_mean_curve([run.loss for run in runs]),
        val_loss=_mean_curve([run.val_loss for run in runs]),
        val_loss_bf16=_mean_curve([run.val_loss_bf16 for run in runs]),
        tokens_per_second=_mean_curve([run.tokens_per_second for run in runs]),
        events=dict(sum((Counter(run.events) for run in runs), Counter())),
    )


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """On the first one's tokens inside the range of all; empty where one is."""
    if not all(map(len, curves)):
        return Curve(np.zeros(0), np.zeros(0))
    start = max(curve.tokens[0] for curve in curves)
    end = min(curve.tokens[-1] for curve in curves)
    tokens = curves[0].tokens
    tokens = tokens[(tokens >= start) & (tokens <= end)]
    values = [np.interp(tokens, curve.tokens, curve.values) for curve in curves]
    return Curve(tokens, np.mean(values, axis=0) if len(tokens) else np.zeros(0))
