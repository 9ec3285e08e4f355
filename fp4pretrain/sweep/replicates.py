"""Replicates of one config: runs that differ in the order of sums, in the order of data, or in the weights
alone.

Another order of sums changes nothing but rounding: the sequences of every microbatch are read
rotated (``train.sum_order``), so that the same terms are added in another order, on any device and
backend. (Where a recipe rounds stochastically, a sequence also meets the noise of another place.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import data_seed
from fp4pretrain.sweep.engine import train_all

_OURS = ("run_dir", "name", "baseline", "resume", "train.sum_order")


def train_replicates(
    overrides: Sequence[str], *, replicates: int, out: Path
) -> dict[str, list[Path]]:
    """Train ``3 * replicates - 2`` runs, or what is left of them; the folders by what differs.

    All three kinds share the first run. Raises UserError.
    """
    for text in overrides:
        if text.partition("=")[0] in _OURS:
            raise UserError(
                f"{text.partition('=')[0]}: noise sets it for its replicates; leave it out (--out "
                "names the folder)"
            )
    if replicates < 2:
        raise UserError(f"replicates: {replicates} show no spread; give 2 or more")
    config = compose(list(overrides))
    if config.train.micro_batch < replicates:
        raise UserError(
            f"train.micro_batch: {config.train.micro_batch} sequences have fewer orders than "
            f"{replicates} replicates; raise it, or lower --replicates"
        )
    seed, data = config.seed, data_seed(config)
    others = range(1, replicates)
    variants = {
        "sums": [(seed, data, n) for n in others],
        "data": [(seed, data + n, 0) for n in others],
        "weights": [(seed + n, data, 0) for n in others],
    }
    first = (seed, data, 0)
    rest = [text for text in overrides if text.partition("=")[0] not in ("seed", "data.seed")]
    whole = [first, *(one for found in variants.values() for one in found)]
    folder = out / config.precision.name
    sweep = [
        [
            *rest, f"run_dir='{folder}'", "resume=auto",
            f"seed={s}", f"data.seed={d}", f"train.sum_order={n}",
        ]
        for s, d, n in whole
    ]  # fmt: skip
    outcomes = train_all(sweep, compared=False)
    missing = sum(one.state != "finished" for one in outcomes)
    if missing:
        raise UserError(
            f"noise: {missing} of {len(outcomes)} replicates are not finished; the same command goes on "
            "with them"
        )
    paths = {key: one.run.path for key, one in zip(whole, outcomes, strict=True) if one.run}
    return {level: [paths[one] for one in (first, *found)] for level, found in variants.items()}
