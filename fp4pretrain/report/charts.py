"""The charts of a page as plotly figures: losses, gaps, what goes on beside them, and observations.

Every figure's x axis is tokens. A run has one colour in all figures (Okabe and Ito's, dashed from the
seventh run on), and names stand in the legend, where any number of them fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fp4pretrain.report.comparison import Comparison, Result
from fp4pretrain.report.gap import match, trailing_mean
from fp4pretrain.report.load import Curve, FloatArray, Run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_BASELINE = "#888888"  # seen on white and on black
_FRAME_FROM = 0.08  # part of the token range whose losses may lie outside the first view


def losses(comparison: Comparison) -> go.Figure:
    """Training loss as lines, validation loss as markers, for every recipe."""
    figure = go.Figure()
    seen: list[FloatArray] = []
    for number, result in enumerate(comparison.results):
        loss = result.run.loss
        smooth = trailing_mean(loss.values, comparison.window)
        figure.add_trace(_line(Curve(loss.tokens, smooth), result, number))
        seen.append(_late(loss.tokens, smooth))
        if len(result.run.val_loss):
            figure.add_trace(_marks(result.run.val_loss, result, number, text="validation"))
            seen.append(_late(result.run.val_loss.tokens, result.run.val_loss.values))
    if comparison.unigram_entropy is not None:
        figure.add_hline(
            comparison.unigram_entropy, line_dash="dot", line_width=1, line_color=_BASELINE,
            annotation_text="unigram entropy", annotation_position="bottom left",
        )  # fmt: skip
    return _dressed(figure, "loss (nats a token)", seen)


def gaps(comparison: Comparison) -> go.Figure:
    """The gap to the baseline in per cent: of the training loss with its interval, and at evaluations."""
    figure = go.Figure()
    seen = [np.zeros(1)]
    for number, result in enumerate(comparison.results):
        if result.matched is None:
            continue
        gap = 100 * result.matched.gap
        tokens = result.matched.tokens
        if result.band is not None:
            half = 100 * result.band
            figure.add_trace(_band(tokens, gap - half, gap + half, result, number))
            seen += [_late(tokens, gap - half), _late(tokens, gap + half)]
        figure.add_trace(_line(Curve(tokens, gap), result, number))
        seen.append(_late(tokens, gap))
        held = match(result.run.val_loss, comparison.baseline.run.val_loss)
        if held is not None:
            points = Curve(held.tokens, 100 * held.gap)
            figure.add_trace(_marks(points, result, number, text="validation"))
            seen.append(_late(points.tokens, points.values))
    figure.add_hline(0, line_color=_BASELINE, line_width=1.5)
    return _dressed(figure, "gap (%)", seen)


def beside(comparison: Comparison) -> go.Figure:
    """Learning rate, gradient norm and throughput, and events as crosses on the gradient norm's axis."""
    names = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"}
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, subplot_titles=[*names.values()]
    )
    for number, result in enumerate(comparison.results):
        for row, key in enumerate(names, start=1):
            curve: Curve = getattr(result.run, key)
            trace = _line(curve, result, number)
            trace.showlegend = row == 1
            figure.add_trace(trace, row=row, col=1)
        if result.run.happened:
            figure.add_trace(_events(result, number), row=2, col=1)
    figure.update_yaxes(type="log", row=2, col=1)
    dressed = _dressed(figure, "", [])
    dressed.update_xaxes(title_text=None, row=1, col=1)
    return dressed.update_xaxes(title_text=None, row=2, col=1)


def observations(comparison: Comparison) -> list[dict[str, Any]]:
    """For each run that observed its casts: name, tokens and sites, and statistic -> [time][site]."""
    found = []
    for result in comparison.results:
        rows = [row for row in result.run.observed if row.get("observed", {}).get("sites")]
        if not rows:
            continue
        sites = rows[-1]["observed"]["sites"]
        names = [n for n in rows[-1]["observed"] if n not in ("sites", "scales")]
        found.append(
            {
                "name": result.run.name,
                "tokens": [row["tokens"] for row in rows],
                "sites": sites,
                "statistics": {name: [_at(row, name, sites) for row in rows] for name in names},
            }
        )
    return found


def _at(row: dict[str, Any], name: str, sites: Sequence[str]) -> list[float | None]:
    """A statistic of one observation for each site; null where it has none."""
    seen = row["observed"]
    values = dict(zip(seen["sites"], seen.get(name, ()), strict=False))
    return [_finite(values.get(site)) for site in sites]


def _finite(value: Any) -> float | None:
    if value is None or not math.isfinite(float(value)):
        return None
    return float(value)


def _style(number: int) -> tuple[str, str]:
    if number == 0:
        return _BASELINE, "solid"
    turn, colour = divmod(number - 1, len(_COLOURS))
    return _COLOURS[colour], _DASHES[turn % len(_DASHES)]


def _line(curve: Curve, result: Result, number: int) -> go.Scatter:
    colour, dash = _style(number)
    return go.Scatter(
        x=_rounded(curve.tokens), y=_rounded(curve.values), name=_name(result),
        legendgroup=str(number), mode="lines", line={"color": colour, "dash": dash, "width": 1.8},
    )  # fmt: skip


def _marks(curve: Curve, result: Result, number: int, *, text: str) -> go.Scatter:
    colour, _ = _style(number)
    return go.Scatter(
        x=_rounded(curve.tokens), y=_rounded(curve.values), name=f"{_name(result)}, {text}",
        legendgroup=str(number), showlegend=False, mode="markers",
        marker={"color": colour, "size": 7, "symbol": "circle-open", "line": {"width": 2}},
    )  # fmt: skip


def _band(
    tokens: FloatArray, low: FloatArray, high: FloatArray, result: Result, number: int
) -> go.Scatter:
    colour, _ = _style(number)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=_rounded(np.concatenate([tokens, tokens[::-1]])),
        y=_rounded(np.concatenate([high, low[::-1]])),
        name=f"{_name(result)}, 90% interval", legendgroup=str(number), showlegend=False,
        mode="lines", line={"width": 0}, fill="toself", hoverinfo="skip",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
    )  # fmt: skip


def _events(result: Result, number: int) -> go.Scatter:
    colour, _ = _style(number)
    norm = result.run.grad_norm
    tokens = [at for at, _ in result.run.happened]
    heights = np.interp(tokens, norm.tokens, norm.values) if len(norm) else np.ones(len(tokens))
    return go.Scatter(
        x=tokens, y=_rounded(np.asarray(heights)), text=[event for _, event in result.run.happened],
        name=f"{_name(result)}, events", legendgroup=str(number), showlegend=False, mode="markers",
        marker={"color": colour, "size": 10, "symbol": "x"},
    )  # fmt: skip


def _name(result: Result) -> str:
    return f"{result.run.name} (diverged)" if result.diverged else result.run.name


def _dressed(figure: go.Figure, y: str, seen: Sequence[FloatArray]) -> go.Figure:
    """Axes, legend and the first view, which leaves the descent of the first tokens outside."""
    figure.update_layout(
        margin={"l": 60, "r": 10, "t": 40, "b": 45},
        legend={"orientation": "v", "itemdoubleclick": "toggleothers", "tracegroupgap": 0},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="tokens")
    if y:
        figure.update_yaxes(title_text=y)
    values = np.concatenate([one for one in seen if len(one)]) if any(map(len, seen)) else None
    if values is not None and len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1.0)
        figure.update_yaxes(range=[low - margin, high + margin])
    return figure


def _late(tokens: FloatArray, values: FloatArray) -> FloatArray:
    """The finite values that the first view must show."""
    if not len(tokens):
        return values
    late: FloatArray = values[(tokens >= _FRAME_FROM * tokens[-1]) & np.isfinite(values)]
    return late


def _rounded(values: FloatArray) -> np.ndarray[Any, np.dtype[np.float32]]:
    """FP32 values for plotly, whose seven digits are more than a screen shows; a value that is not finite
    becomes a hole in the line. Arrays are written as base64 as they are, while plotly checks each number
    of a list."""
    return np.where(np.isfinite(values), values, np.nan).astype(np.float32)


def in_progress(run: Run) -> bool:
    """Whether a run has steps left."""
    return run.steps is not None and run.last[0] < run.steps
