"""The picture of a comparison: loss curves above, their gap to the baseline below.

Both panels share the token axis. Curves are named at their ends, where the eye already is, and the
colours (Okabe and Ito's) stay apart for colour-blind readers. A band is the 90% interval over seeds.
The first tokens' steep descent is left outside the frame: it would press the differences that matter
into a line's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fp4pretrain.files import replacing
from fp4pretrain.report.comparison import Comparison, Result, gap_text, tokens_text
from fp4pretrain.report.gap import match, trailing_mean
from fp4pretrain.report.load import Curve, FloatArray

_BASELINE_COLOUR = "#000000"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")  # a seventh run begins the colours again, dashed
_GREY = "#6b6b6b"
_FRAME_FROM = 0.08  # part of the token range whose losses may lie above the frame
_LABEL_STEP = 15.0  # distance of two labels in points, for text of 10 points


@dataclass(frozen=True)
class _Label:
    """A name to stand right of the panel at the end of its curve."""

    text: str
    x: float
    y: float
    colour: str


def draw(comparison: Comparison, path: Path) -> None:
    """Write the picture as a PNG."""
    figure = Figure(figsize=(9.5, 7.0), facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=(3, 2), gridspec_kw={"hspace": 0.1}
    )
    _draw_losses(upper, comparison)
    _draw_gaps(lower, comparison)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=10)
    end = max(result.run.loss.tokens[-1] for result in comparison.results)
    lower.set_xlim(0, 1.01 * end)
    lower.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: tokens_text(tokens)))
    lower.set_xlabel("tokens", fontsize=11)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=160, bbox_inches="tight", pad_inches=0.15)


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    labels, framed = [], []
    for number, result in enumerate(comparison.results):
        colour, dash = _style(number)
        loss = result.run.loss
        smooth = trailing_mean(loss.values, comparison.window)
        if number == 0 and comparison.window > 1:  # one curve's noise is enough to show
            axes.plot(loss.tokens, loss.values, color="#bbbbbb", alpha=0.6, linewidth=0.7)
        axes.plot(loss.tokens, smooth, color=colour, linestyle=dash, linewidth=1.6)
        _markers(axes, result.run.val_loss, colour)
        labels.append(_end_label(result.run.name, loss.tokens, smooth, colour))
        framed += [_late(loss.tokens, smooth), _late(*_points(result.run.val_loss))]
    if comparison.unigram_entropy is not None:
        axes.axhline(comparison.unigram_entropy, color=_GREY, linewidth=1, linestyle=(0, (1, 2)))
        labels.append(_Label("unigram entropy", 0.0, comparison.unigram_entropy, _GREY))
        framed.append(np.array([comparison.unigram_entropy]))
    _frame(axes, framed)
    smoothing = f", mean of {comparison.window} rows" if comparison.window > 1 else ""
    title = f"Training loss (lines{smoothing}) and validation loss (circles)"
    axes.set_title(title, loc="left", fontsize=11, color="#333333")
    axes.set_ylabel("loss (nats)", fontsize=11)
    _write_labels(axes, labels)


def _draw_gaps(axes: Axes, comparison: Comparison) -> None:
    name = comparison.baseline.run.name
    end = float(comparison.baseline.run.loss.tokens[-1])
    axes.axhline(0, color=_BASELINE_COLOUR, linewidth=1.6)
    labels, framed = [_Label(name, end, 0.0, _BASELINE_COLOUR)], [np.zeros(1)]
    for number, result in enumerate(comparison.results[1:], start=1):
        colour, dash = _style(number)
        labels.append(_gap_curve(axes, result, colour=colour, dash=dash, framed=framed))
        matched = match(result.run.val_loss, comparison.baseline.run.val_loss)
        if matched is not None:
            points = Curve(matched.tokens, 100 * matched.gap)
            _markers(axes, points, colour)
            framed.append(_late(*_points(points)))
    _frame(axes, framed)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda gap, _: f"{gap:+.3g}%" if gap else "0"))
    axes.set_ylabel(f"gap to {name}" if len(name) < 24 else "gap to the baseline", fontsize=11)
    _write_labels(axes, labels)


def _gap_curve(
    axes: Axes, result: Result, *, colour: str, dash: str, framed: list[FloatArray]
) -> _Label:
    matched = result.matched
    assert matched is not None, "only the baseline is not matched, and it is drawn as zero"
    gap = 100 * matched.gap
    axes.plot(matched.tokens, gap, color=colour, linestyle=dash, linewidth=1.6)
    framed.append(_late(matched.tokens, gap))
    if result.band is not None:
        edges = gap - 100 * result.band, gap + 100 * result.band
        axes.fill_between(matched.tokens, *edges, color=colour, alpha=0.15, linewidth=0)
        framed += [_late(matched.tokens, edge) for edge in edges]
    told = f"{gap_text(result.gaps['loss'])}%" if np.isfinite(gap[-1]) else "diverged"
    text = f"{result.run.name}  {told}"
    return _end_label(text, matched.tokens, gap, colour)


def _style(number: int) -> tuple[str, str]:
    if number == 0:
        return _BASELINE_COLOUR, "-"
    turn, colour = divmod(number - 1, len(_COLOURS))
    return _COLOURS[colour], _DASHES[turn % len(_DASHES)]


def _markers(axes: Axes, curve: Curve, colour: str) -> None:
    axes.plot(*_points(curve), "o", color=colour, markersize=4.5, markerfacecolor="white")


def _points(curve: Curve) -> tuple[FloatArray, FloatArray]:
    return curve.tokens, curve.values


def _late(tokens: FloatArray, values: FloatArray) -> FloatArray:
    """The finite values that the frame must show."""
    if not len(tokens):
        return values
    late: FloatArray = values[(tokens >= _FRAME_FROM * tokens[-1]) & np.isfinite(values)]
    return late


def _frame(axes: Axes, framed: Sequence[FloatArray]) -> None:
    values = np.concatenate(list(framed))
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0)
    axes.set_ylim(low - margin, high + margin)


def _end_label(text: str, tokens: FloatArray, values: FloatArray, colour: str) -> _Label:
    """A label at the last finite point of a curve."""
    finite = np.flatnonzero(np.isfinite(values))
    last = finite[-1] if len(finite) else 0
    return _Label(text, float(tokens[last]), float(np.nan_to_num(values[last])), colour)


def _write_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Write the labels right of the panel, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.y)
    heights = [min(max((label.y - low) / (high - low), 0.0), 1.0) for label in labels]
    panel = axes.get_window_extent().height / axes.figure.dpi * 72  # height in points
    placed = spread(heights, step=_LABEL_STEP / panel)
    for label, height, place in zip(labels, heights, placed, strict=True):
        axes.plot(
            (1.0, 1.036),
            (height, place),
            transform=axes.transAxes,
            clip_on=False,
            color=label.colour,
            linewidth=0.7,
            alpha=0.6,
        )
        axes.text(
            1.04,
            place,
            label.text,
            transform=axes.transAxes,
            color=label.colour,
            fontsize=10,
            verticalalignment="center",
        )


def spread(heights: Sequence[float], *, step: float) -> list[float]:
    """Ascending heights in [0, 1], moved as little as possible (squared) to lie ``step`` apart.

    With ``i * step`` taken off, "apart" becomes "ascending": isotonic regression, solved by pooling
    neighbours that are out of order into their mean.
    """
    pools: list[tuple[float, int]] = []  # mean, count
    for number, height in enumerate(heights):
        mean, count = height - number * step, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (mean * count + before * size) / (count + size), count + size
        pools.append((mean, count))
    room = max(0.0, 1 - (len(heights) - 1) * step)
    flat = [min(max(mean, 0.0), room) for mean, count in pools for _ in range(count)]
    return [place + number * step for number, place in enumerate(flat)]
