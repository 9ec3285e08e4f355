"""Runs of one recipe that differ in their seeds alone, as one result; and pairs of runs of one seed.

A short run orders recipes by chance: the seed alone moves a loss by per cents. So runs that are equal
but for their seeds are pooled. A pair is a recipe's run and the baseline's of the same seed and data
order: both began with the same weights and saw the same batches. Runs that differ in the order of
sums only (``train.sum_order``) are no seeds of their own: their mean is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fp4pretrain.errors import UserError
from fp4pretrain.report.differences import differences
from fp4pretrain.report.load import Curve, Parts, Run

Key = tuple[int, int]  # seed, data.seed


@dataclass(frozen=True)
class Pool:
    """``run``: the mean of all ``members``. ``seeds``: by seed and data order, each the mean of the
    runs that differ in the order of sums only."""

    run: Run
    members: tuple[Run, ...]
    seeds: Mapping[Key, Run]

    @property
    def first(self) -> Run:
        """The run that stands for all where they are equal: config, plan."""
        return self.members[0]


def seed_of(run: Run) -> Key:
    """The seed of the weights and that of the order of the data."""
    if run.fingerprint is not None:
        found = run.fingerprint["seeds"]
        return found["seed"], found["data.seed"]
    seed = run.config.get("seed", 0)
    data = (run.config.get("data") or {}).get("seed")
    return seed, seed if data is None else data


def sum_order(run: Run) -> int:
    """Which order of sums the run took."""
    return int((run.config.get("train") or {}).get("sum_order", 0))


def label(key: Key) -> int | str:
    """A seed as it is shown: 1, or 1/2 where the data have another than the weights."""
    seed, data = key
    return seed if seed == data else f"{seed}/{data}"


def pooled(runs: Sequence[Run]) -> list[Pool]:
    """One pool for each recipe and its settings, in the order of their first runs.

    A second run of the same seeds and order of sums stays apart, and so does one that was resumed
    as another experiment.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if _may_join(run, group):
                group.append(run)
                break
        else:
            groups.append([run])
    names = [_recipe_name(group[0]) for group in groups]
    return [
        _pool(group, name if name and names.count(name) == 1 else group[0].name)
        for name, group in zip(names, groups, strict=True)
    ]


def common(pool: Pool, baseline: Pool) -> list[Key]:
    """The seeds that both have runs of, in the pool's order."""
    return [key for key in pool.seeds if key in baseline.seeds]


def without_partner(pool: Pool, baseline: Pool) -> list[Key]:
    """The seeds of either that the other lacks."""
    return sorted(pool.seeds.keys() ^ baseline.seeds.keys())


def refuse_alone(pools: Sequence[Pool]) -> None:
    """Raise ``UserError`` where there is nothing beside the baseline, or no seed in common with it."""
    base, *others = pools
    if not others:
        raise UserError(
            "runs: all are one recipe with several seeds; add runs of another recipe "
            "(how much seeds move a loss: fp4pretrain noise)"
        )
    for pool in others:
        if not common(pool, base):
            ours, theirs = (", ".join(str(label(k)) for k in one.seeds) for one in (pool, base))
            raise UserError(
                f"seed: {pool.run.name} ({ours}) and the baseline {base.run.name} ({theirs}) have no "
                "seed in common, so it differs in more than the recipe; train one, or compare with "
                "--force"
            )


def mean_run(runs: Sequence[Run], name: str) -> Run:
    """The runs' mean curves, under the first one's config."""
    if len(runs) == 1:
        return replace(runs[0], name=name)
    return replace(
        runs[0],
        name=name,
        loss=_mean_curve([run.loss for run in runs]),
        val_loss=_mean_curve([run.val_loss for run in runs]),
        val_loss_bf16=_mean_curve([run.val_loss_bf16 for run in runs]),
        tokens_per_second=_mean_curve([run.tokens_per_second for run in runs]),
        val_parts=_mean_parts([run.val_parts for run in runs]),
        events=dict(sum((Counter(run.events) for run in runs), Counter())),
    )


def _pool(group: list[Run], shown: str) -> Pool:
    by_seed: dict[Key, list[Run]] = {}
    for run in group:
        by_seed.setdefault(seed_of(run), []).append(run)
    seeds = {key: mean_run(runs, runs[0].name) for key, runs in by_seed.items()}
    name = group[0].name if len(group) == 1 else f"{shown} ({len(seeds)} seeds)"
    return Pool(mean_run(list(seeds.values()), name), tuple(group), seeds)


def _may_join(run: Run, group: Sequence[Run]) -> bool:
    taken = {(seed_of(one), sum_order(one)) for one in group}
    return (
        not run.changes
        and not group[0].changes
        and (seed_of(run), sum_order(run)) not in taken
        and not differences(run, group[0])
    )


def _recipe_name(run: Run) -> str | None:
    precision = run.config.get("precision")
    return precision.get("name") if isinstance(precision, Mapping) else None


def _mean_parts(parts: Sequence[Mapping[str, Parts]]) -> dict[str, Parts]:
    """Mean losses of the parts; None unless all runs have as many parts, at the same tokens."""
    found = {}
    for key in parts[0]:
        ours = [one[key] for one in parts if key in one]
        if len(ours) == len(parts) and len({(p.tokens, len(p.values)) for p in ours}) == 1:
            found[key] = Parts(ours[0].tokens, np.mean([p.values for p in ours], axis=0))
    return found


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean curve on the first one's tokens inside the range of all; empty where one curve is empty."""
    if not all(map(len, curves)):
        return Curve(np.zeros(0), np.zeros(0))
    start = max(curve.tokens[0] for curve in curves)
    end = min(curve.tokens[-1] for curve in curves)
    tokens = curves[0].tokens
    tokens = tokens[(tokens >= start) & (tokens <= end)]
    values = [np.interp(tokens, curve.tokens, curve.values) for curve in curves]
    return Curve(tokens, np.mean(values, axis=0) if len(tokens) else np.zeros(0))
