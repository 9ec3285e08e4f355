"""``fp4pretrain compare``: how far a recipe's loss is from its baseline's.

``compare`` reads the runs, pools those that differ in their seeds alone, takes each recipe's best
learning rate, refuses what differs in more than the recipe, pairs runs by seed, matches their curves by
tokens, draws the picture and, if asked, writes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp4pretrain.errors import UserError
from fp4pretrain.report import seeds
from fp4pretrain.report.comparison import Comparison, Result, tokens_text
from fp4pretrain.report.differences import (
    RATE,
    Difference,
    differences,
    order_difference,
    refuse_changed,
    refuse_unequal,
)
from fp4pretrain.report.endpoint import Noise, Pair, curve_of, diverged, measure
from fp4pretrain.report.equal_loss import equal_loss
from fp4pretrain.report.gap import match, smoothing_window, steady_rate, trailing_mean
from fp4pretrain.report.load import Curve, FloatArray, Run, load_run, short_names
from fp4pretrain.report.seeds import Pool
from fp4pretrain.report.student import quantile
from fp4pretrain.report.tuning import tuned

_CURVES = ("loss", "val_loss", "val_loss_bf16")


@dataclass(frozen=True)
class Options:
    """``force`` compares runs that differ in more than the recipe. ``noise``: of one run, measured by
    ``fp4pretrain noise``; it gives a single pair an interval. ``html``: write a page, too. ``remarks``:
    sentences of the caller's, for the table and the page."""

    force: bool = False
    html: bool = False
    noise: Noise | None = None
    remarks: tuple[str, ...] = ()


def compare(
    runs: Sequence[Path],
    *,
    out: Path,
    baseline: Path | None = None,
    options: Options | None = None,
) -> Comparison:
    """Compare runs with a baseline, by default the first of them.

    ``out`` is the picture's path (``.png``) or a folder to put ``compare.png`` in; the page lies
    beside it as ``.html``. Files among ``runs`` are passed over, folders that hold no run are named
    and left out. Seeds without a partner are left out and named.

    Raises ``UserError`` where fewer than two runs are left, for a run that shares no tokens or no seed
    with the baseline, or that differs from it in more than the recipe.
    """
    options = options or Options()
    picture = _picture_path(Path(out))
    loaded, remarks = _load(runs, baseline)
    if not options.force:
        refuse_changed(loaded)
    pools, tuning = tuned(seeds.pooled(loaded))
    first, others = pools[0], pools[1:]
    if not options.force:
        seeds.refuse_alone(pools)
    found = [
        one
        for pool in others
        for one in _differences(pool, first)
        if not (one.key == RATE and tuning)
    ]
    if not options.force:
        refuse_unequal(found, baseline=first.run.name)
    rows = min(len(pool.run.loss) * pool.run.thinned for pool in pools)
    thinned = max(pool.run.thinned for pool in pools)
    window = max(1, smoothing_window(rows) // thinned)
    comparison = Comparison(
        results=(
            _own_result(first, window),
            *(_result(pool, first, window=window, noise=options.noise) for pool in others),
        ),
        window=window,
        averaged=window * thinned,
        differences=tuple(found),
        tuning=tuning,
        unigram_entropy=first.first.unigram_entropy,
        remarks=(
            *options.remarks,
            *remarks,
            *_unpaired(others, first),
            *_shared_seeds(others, first),
        ),
        picture=picture,
        page=picture.with_suffix(".html") if options.html else None,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    _write(comparison)
    return comparison


def _write(comparison: Comparison) -> None:
    """The picture, and the page if there is one. A training run imports this module but draws nothing, so
    matplotlib and plotly are imported here."""
    from fp4pretrain.report.picture import draw

    draw(comparison, comparison.picture)
    if comparison.page is not None:
        from fp4pretrain.report.page import write_page

        write_page(comparison, comparison.page)


def _load(runs: Sequence[Path], baseline: Path | None) -> tuple[list[Run], list[str]]:
    """The baseline, then the other runs, each once; and what was left out."""
    asked = [*([] if baseline is None else [Path(baseline)]), *map(Path, runs)]
    for path in asked:
        if not path.exists() or (path == baseline and not path.is_dir()):
            raise UserError(f"{path}: no such run; give the run_dir of a run")
    unique = list({path.resolve(): path for path in asked if path.is_dir()}.values())
    names = short_names(unique)
    loaded, problems = [], []
    for path, name in zip(unique, names, strict=True):
        try:
            loaded.append(load_run(path, name=name))
        except UserError as problem:
            if path == baseline:
                raise
            problems.append(problem)
    if len(loaded) < 2:
        if problems:
            raise problems[0]
        raise UserError("runs: there is nothing to compare; give two runs, or one and a baseline")
    return loaded, [f"Left out: {str(problem).split(';')[0]}." for problem in problems]


def _pairs(pool: Pool, baseline: Pool) -> list[Pair]:
    """Pairs of runs of one seed. Where no seed is shared and the comparison is forced: the pair of means."""
    shared = seeds.common(pool, baseline)
    return [(pool.seeds[key], baseline.seeds[key]) for key in shared] or [(pool.run, baseline.run)]


def _differences(pool: Pool, baseline: Pool) -> list[Difference]:
    """Differences of the pools' first runs, which stand for the others; and of the order of the data, pair
    by pair."""
    found = differences(pool.first, baseline.first)
    orders = [one for pair in _pairs(pool, baseline) for one in order_difference(*pair)]
    if not seeds.common(pool, baseline):
        ours, theirs = (
            ", ".join(str(seeds.label(key)) for key in one.seeds) for one in (pool, baseline)
        )
        return [*found, Difference(pool.run.name, "seed", theirs, ours)]
    return [*found, *orders[:1]]


def _unpaired(pools: Sequence[Pool], baseline: Pool) -> list[str]:
    """A sentence for each recipe that has seeds which the baseline lacks, or the other way round."""
    told = []
    for pool in pools:
        odd = seeds.without_partner(pool, baseline)
        if odd and seeds.common(pool, baseline):
            names = ", ".join(str(seeds.label(key)) for key in odd)
            told.append(f"{pool.run.name}: seeds without a partner are left out: {names}.")
    return told


def _shared_seeds(pools: Sequence[Pool], baseline: Pool) -> list[str]:
    """A sentence where pairs share a seed of the data or of the weights: their interval does not cover
    what they share."""
    told = []
    for pool in pools:
        keys = seeds.common(pool, baseline)
        for number, what in enumerate(("seed (weights)", "data.seed (order)")):
            if len(keys) > 1 and len({key[number] for key in keys}) < len(keys):
                told.append(f"{pool.run.name}: pairs share a {what}, whose noise ± leaves out.")
    return told


def _own_result(pool: Pool, window: int) -> Result:
    """The baseline's row: its own last losses, no gaps."""
    run = pool.run
    return Result(
        name=_name(pool),
        run=run,
        seeds=tuple(map(seeds.label, pool.seeds)),
        tokens=float(run.loss.tokens[-1]),
        losses=_losses(run, window),
        tokens_per_second=steady_rate(run.tokens_per_second),
        diverged=_diverged(pool, None, window),
    )


def _result(pool: Pool, baseline: Pool, *, window: int, noise: Noise | None) -> Result:
    pairs = _pairs(pool, baseline)
    run, theirs = (
        seeds.mean_run([pair[side] for pair in pairs], one.run.name)
        for side, one in enumerate((pool, baseline))
    )
    matched = match(run.loss, theirs.loss, window=window)
    if matched is None:
        raise UserError(
            f"{run.path}: no tokens in common with the baseline {theirs.name} "
            f"({_span(run.loss)} against {_span(theirs.loss)}); compare runs of similar length"
        )
    gaps = {name: measure(pairs, name, window=window, noise=noise) for name in _CURVES}
    has_validation = gaps["val_loss"] is not None
    return Result(
        name=_name(pool),
        run=run,
        seeds=tuple(map(seeds.label, seeds.common(pool, baseline) or pool.seeds)),
        tokens=float(matched.tokens[-1]),
        losses={name: gap.loss for name, gap in gaps.items() if gap is not None},
        tokens_per_second=steady_rate(run.tokens_per_second),
        gaps={name: gap for name, gap in gaps.items() if gap is not None},
        equal_loss=equal_loss(pairs) if has_validation else None,
        matched=matched,
        band=_band(pairs, matched.tokens, window),
        diverged=_diverged(pool, theirs, window),
    )


def _diverged(pool: Pool, baseline: Run | None, window: int) -> tuple[str, ...]:
    return tuple(one.name for one in pool.members if diverged(one, baseline, window=window))


def _band(pairs: Sequence[Pair], tokens: FloatArray, window: int) -> FloatArray | None:
    """Half the interval of the training loss's gap, from the pairs, on tokens [rows]."""
    found = [match(run.loss, baseline.loss, window=window) for run, baseline in pairs]
    matched = [one for one in found if one is not None]
    if len(matched) < 2 or len(matched) < len(pairs):
        return None
    gaps = np.stack([np.interp(tokens, one.tokens, one.gap) for one in matched])
    error: FloatArray = gaps.std(axis=0, ddof=1) / np.sqrt(len(matched))
    return quantile(len(matched) - 1) * error


def _losses(run: Run, window: int) -> dict[str, float]:
    found = {"loss": float(trailing_mean(run.loss.values, window)[-1])}
    for name in _CURVES[1:]:
        curve = curve_of(run, name)
        if len(curve):
            found[name] = float(curve.values[-1])
    return found


def _name(pool: Pool) -> str:
    return pool.run.name.rpartition(" (")[0] if len(pool.members) > 1 else pool.run.name


def _picture_path(out: Path) -> Path:
    if out.suffix not in ("", ".png"):
        raise UserError(f"out: {out} is neither a folder nor a .png; name one of them")
    return out if out.suffix else out / "compare.png"


def _span(curve: Curve) -> str:
    return f"{tokens_text(curve.tokens[0])} to {tokens_text(curve.tokens[-1])}"
