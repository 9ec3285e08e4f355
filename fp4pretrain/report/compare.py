"""``fp4pretrain compare``: how far a recipe's loss is from its baseline's.

``compare`` reads the runs, refuses those that differ in more than the recipe, matches their curves
by tokens, draws the picture and, if asked, writes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fp4pretrain.errors import UserError
from fp4pretrain.report.comparison import Comparison, Result, Score, tokens_text
from fp4pretrain.report.differences import differences, refuse_unequal
from fp4pretrain.report.gap import match, smoothing_window, steady_rate, trailing_mean
from fp4pretrain.report.load import Curve, Run, load_run, short_names
from fp4pretrain.report.page import write_page
from fp4pretrain.report.picture import draw


def compare(
    runs: Sequence[Path],
    *,
    out: Path,
    baseline: Path | None = None,
    force: bool = False,
    html: bool = False,
) -> Comparison:
    """Compare runs with a baseline, by default the first of them.

    ``out`` is the picture's path (``.png``) or a folder to put ``compare.png`` in; the page lies
    beside it as ``.html``. ``force`` compares runs that differ in more than the recipe.
    The unigram entropy of the data, where the baseline noted it, is drawn as a line: the loss of a
    model that knows only token frequencies.
    Raises ``UserError`` for a run that cannot be read, that shares no tokens with the baseline, or
    that differs from it in more than the recipe.
    """
    picture = _picture_path(Path(out))
    loaded = _load(runs, baseline)
    first, others = loaded[0], loaded[1:]
    found = [one for run in others for one in differences(run.name, run.config, first.config)]
    if not force:
        refuse_unequal(found, baseline=first.name)
    window = smoothing_window(min(len(run.loss) for run in loaded))
    comparison = Comparison(
        results=(_own_result(first, window), *(_result(run, first, window) for run in others)),
        window=window,
        differences=tuple(found),
        unigram_entropy=first.unigram_entropy,
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


def _own_result(run: Run, window: int) -> Result:
    """The baseline's row: its own last losses, no gaps."""
    return Result(
        run=run,
        tokens=float(run.loss.tokens[-1]),
        loss=Score(float(trailing_mean(run.loss.values, window)[-1]), None),
        val_loss=_last(run.val_loss),
        val_loss_bf16=_last(run.val_loss_bf16),
        tokens_per_second=steady_rate(run.tokens_per_second),
        matched=None,
    )


def _result(run: Run, baseline: Run, window: int) -> Result:
    matched = match(run.loss, baseline.loss, window=window)
    if matched is None:
        raise UserError(
            f"{run.path}: no tokens in common with the baseline {baseline.name} "
            f"({_span(run.loss)} against {_span(baseline.loss)}); compare runs of similar length"
        )
    return Result(
        run=run,
        tokens=float(matched.tokens[-1]),
        loss=Score(float(matched.run[-1]), float(matched.gap[-1])),
        val_loss=_matched_score(run.val_loss, baseline.val_loss),
        val_loss_bf16=_matched_score(run.val_loss_bf16, baseline.val_loss_bf16),
        tokens_per_second=steady_rate(run.tokens_per_second),
        matched=matched,
    )


def _matched_score(run: Curve, baseline: Curve) -> Score | None:
    matched = match(run, baseline)
    if matched is None:
        return _last(run)
    return Score(float(matched.run[-1]), float(matched.gap[-1]))


def _last(curve: Curve) -> Score | None:
    return Score(float(curve.values[-1]), None) if len(curve) else None


def _picture_path(out: Path) -> Path:
    if out.suffix not in ("", ".png"):
        raise UserError(f"out: {out} is neither a folder nor a .png; name one of them")
    return out if out.suffix else out / "compare.png"


def _span(curve: Curve) -> str:
    return f"{tokens_text(curve.tokens[0])} to {tokens_text(curve.tokens[-1])}"
