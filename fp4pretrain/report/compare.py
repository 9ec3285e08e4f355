"""``fp4pretrain compare``: how far a recipe's loss is from its baseline's.

``compare`` reads the runs, pools those that differ in their seed alone, refuses those that differ in
more than the recipe, matches their curves by tokens, draws the picture and, if asked, writes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fp4pretrain.errors import UserError
from fp4pretrain.report.comparison import Comparison, Result, Score, tokens_text
from fp4pretrain.report.differences import Difference, differences, refuse_unequal
from fp4pretrain.report.gap import (
    MatchedCurves,
    match,
    smoothing_window,
    steady_rate,
    trailing_mean,
)
from fp4pretrain.report.load import Curve, FloatArray, Run, load_run, short_names
from fp4pretrain.report.page import write_page
from fp4pretrain.report.picture import draw
from fp4pretrain.report.seeds import Pool, alone, pooled, refuse_unpaired, standard_error


def compare(
    runs: Sequence[Path],
    *,
    out: Path,
    baseline: Path | None = None,
    force: bool = False,
    html: bool = False,
) -> Comparison:
    """Compare runs with a baseline, by default the first of them.

    Runs equal but for the seed are one result each (``report.seeds``), paired with the baseline's
    run of the same seed.
    ``out`` is the picture's path (``.png``) or a folder to put ``compare.png`` in; the page lies
    beside it as ``.html``. ``force`` compares runs that differ in more than the recipe, one by one.
    The unigram entropy of the data, where the baseline noted it, is drawn as a line: the loss of a
    model that knows only token frequencies.
    Raises ``UserError`` for a run that cannot be read, that shares no tokens with the baseline, that
    differs from it in more than the recipe, or whose seed the baseline lacks.
    """
    picture = _picture_path(Path(out))
    loaded = _load(runs, baseline)
    pools = [alone(run) for run in loaded] if force else pooled(loaded)
    first, others = pools[0], pools[1:]
    if not force:
        refuse_unpaired(pools)
    found = [one for pool in others for one in _differences(pool, first)]
    if not force:
        refuse_unequal(found, baseline=first.run.name)
    window = smoothing_window(min(len(pool.run.loss) for pool in pools))
    comparison = Comparison(
        results=(_own_result(first, window), *(_result(pool, first, window) for pool in others)),
        window=window,
        differences=tuple(found),
        unigram_entropy=first.first.unigram_entropy,
        picture=picture,
        page=picture.with_suffix(".html") if html else None,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(comparison, picture)
    if comparison.page is not None:
        write_page(comparison, comparison.page)
    return comparison


def _load(runs: Sequence[Path], baseline: Path | None) -> list[Run]:
    """The baseline, then the other runs, each once."""
    paths = [Path(run) for run in ([] if baseline is None else [baseline])]
    paths += [Path(run) for run in runs]
    unique = list({path.resolve(): path for path in paths}.values())
    if len(unique) < 2:
        raise UserError("runs: there is nothing to compare; give two runs, or one and a baseline")
    names = short_names(unique)
    return [load_run(path, name=name) for path, name in zip(unique, names, strict=True)]


def _differences(pool: Pool, baseline: Pool) -> list[Difference]:
    """Of the first run and the baseline's of its seed: the others' are the same."""
    one = pool.first
    other = baseline.runs.get(next(iter(pool.runs)), baseline.first)
    return differences(pool.run.name, one.config, other.config)


def _own_result(pool: Pool, window: int) -> Result:
    """The baseline's row: its own last losses, no gaps."""
    run = pool.run
    return Result(
        run=run,
        seeds=tuple(pool.runs),
        tokens=float(run.loss.tokens[-1]),
        loss=Score(float(trailing_mean(run.loss.values, window)[-1]), None),
        val_loss=_last(run.val_loss),
        val_loss_bf16=_last(run.val_loss_bf16),
        tokens_per_second=steady_rate(run.tokens_per_second),
        matched=None,
    )


def _result(pool: Pool, baselines: Pool, window: int) -> Result:
    run, baseline = pool.run, baselines.run
    matched = match(run.loss, baseline.loss, window=window)
    if matched is None:
        raise UserError(
            f"{run.path}: no tokens in common with the baseline {baseline.name} "
            f"({_span(run.loss)} against {_span(baseline.loss)}); compare runs of similar length"
        )
    band = _error(pool, baselines, "loss", matched.tokens, window)
    return Result(
        run=run,
        seeds=tuple(pool.runs),
        tokens=float(matched.tokens[-1]),
        loss=_score(matched, band),
        val_loss=_matched_score(pool, baselines, "val_loss"),
        val_loss_bf16=_matched_score(pool, baselines, "val_loss_bf16"),
        tokens_per_second=steady_rate(run.tokens_per_second),
        matched=matched,
        band=band,
    )


def _matched_score(pool: Pool, baselines: Pool, curve: str) -> Score | None:
    run = getattr(pool.run, curve)
    matched = match(run, getattr(baselines.run, curve))
    if matched is None:
        return _last(run)
    return _score(matched, _error(pool, baselines, curve, matched.tokens, 1))


def _score(matched: MatchedCurves, error: FloatArray | None) -> Score:
    return Score(
        float(matched.run[-1]),
        float(matched.gap[-1]),
        None if error is None else float(error[-1]),
    )


def _error(
    pool: Pool, baselines: Pool, curve: str, tokens: FloatArray, window: int
) -> FloatArray | None:
    """Standard error of the gap in a curve, from the pairs of one seed."""
    if len(pool.runs) < 2:
        return None
    pairs = [
        match(getattr(run, curve), getattr(baselines.runs[seed], curve), window=window)
        for seed, run in pool.runs.items()
    ]
    return standard_error(pairs, tokens)


def _last(curve: Curve) -> Score | None:
    return Score(float(curve.values[-1]), None) if len(curve) else None


def _picture_path(out: Path) -> Path:
    if out.suffix not in ("", ".png"):
        raise UserError(f"out: {out} is neither a folder nor a .png; name one of them")
    return out if out.suffix else out / "compare.png"


def _span(curve: Curve) -> str:
    return f"{tokens_text(curve.tokens[0])} to {tokens_text(curve.tokens[-1])}"
