"""One self-contained HTML page of a comparison: it can be mailed, archived, opened offline, printed.

Verdict and table first; then losses, gaps, what goes on beside them, observations of casts; then what the
runs are, their recipes side by side, and the rest of their configs. Charts are plotly's, whose script is
in the page: a reader zooms, and switches runs on and off. What all names have in common is said once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fp4pretrain.files import write_text
from fp4pretrain.naming import shared_beginning
from fp4pretrain.report import charts, side_by_side
from fp4pretrain.report.comparison import Comparison, Result, gap_text
from fp4pretrain.report.endpoint import UNDECIDED
from fp4pretrain.report.notes import notes
from fp4pretrain.report.side_by_side import Table, state

# Pixels: a chart is as high as its legend, up to 40 runs; behind that the legend scrolls.
_LEGEND_ENTRY, _BESIDE_LEGEND, _HIGHEST = 20, 100, 900
_ASSETS = Path(__file__).parent / "assets"


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison."""
    write_text(path, page(comparison))


def page(comparison: Comparison, *, stamp: str = "") -> str:
    """The page's HTML. ``stamp``: of the runs' state, for a page that is served while they go on."""
    shared, comparison = _shortened(comparison)
    title = escape(comparison.title)
    common = f'<p class="quiet">All runs: {escape(shared)}</p>' if shared else ""
    parts = [
        f"<h1>{title}</h1>",
        common,
        _verdicts(comparison),
        _table(comparison.header(), comparison.cells(), kind="scores"),
        _notes(comparison),
        _chart("Loss", charts.losses(comparison), "losses"),
        _chart(f"Gap to {comparison.baseline.run.name}", charts.gaps(comparison), "gaps"),
        _chart("Beside the loss", charts.beside(comparison), "beside", tall=True),
        _observations(charts.observations(comparison)),
        "<h2>Runs</h2>",
        _side(side_by_side.facts(comparison), marked=_never),
        "<h2>Recipes</h2>",
        _side(side_by_side.recipes(comparison), marked=_unlike_first),
        _side_or_none("Other differences of the configs", side_by_side.configs(comparison)),
    ]
    head = f"<title>{title}</title>\n<style>{_asset('page.css')}</style>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'{head}\n</head>\n<body data-stamp="{escape(stamp)}">\n'
        + "\n".join(parts)
        + f"\n<script>{get_plotlyjs()}</script>\n<script>{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _verdicts(comparison: Comparison) -> str:
    """A sentence for each recipe, and what is wrong with a run."""
    base = comparison.baseline
    lines = [_verdict(result, base.run.name) for result in comparison.results[1:]]
    for result in comparison.results:
        name = escape(result.run.name)
        if result.diverged:
            lines.append(f'<span class="flag">{name} diverged.</span>')
        if charts.in_progress(result.run):
            lines.append(f'<span class="flag">{name} is not finished: {state(result.run)}.</span>')
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<ul class="verdicts">{items}</ul>'


def _notes(comparison: Comparison) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(comparison))
    return f'<details class="quiet"><summary>How these numbers were made</summary><ul>{items}</ul></details>'


def _verdict(result: Result, baseline: str) -> str:
    gap = result.gap
    assert gap is not None, "every result but the baseline's has one"
    name, base = f"<b>{escape(result.run.name)}</b>", escape(baseline)
    said = f"{escape(gap_text(gap))}%"
    if gap.verdict == UNDECIDED:
        return f"{name} against {base}: undecided, {said}."
    return f"{name} is {gap.verdict} {'of ' if gap.verdict == 'ahead' else ''}{base}: {said}."


def _chart(title: str, figure: go.Figure, name: str, *, tall: bool = False) -> str:
    kind = "chart tall" if tall else "chart"
    entries = sum(trace.showlegend is not False for trace in figure.data)
    height = min(_HIGHEST, _BESIDE_LEGEND + _LEGEND_ENTRY * entries)
    return (
        f"<h2>{escape(title)}</h2>\n"
        f'<div class="{kind}" id="chart-{name}" data-figure="figure-{name}" '
        f'style="--legend:{height}px"></div>\n' + _json(f"figure-{name}", figure.to_plotly_json())
    )


def _observations(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    return (
        "<h2>What casts did</h2>\n<div class='controls'>"
        '<label>run <select id="heat-run"></select></label>'
        '<label>statistic <select id="heat-statistic"></select></label>'
        '<label>at <span id="heat-when"></span></label>'
        '<input type="range" id="heat-time" min="0" value="0" aria-label="time">'
        '</div>\n<div class="chart" id="heat"></div>\n' + _json("observations", list(found))
    )


def _json(name: str, value: Any) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), default=_plain)
    text = text.replace("</", "<\\/")  # a name must not end the script
    return f'<script type="application/json" id="{name}">{text}</script>'


def _plain(value: Any) -> Any:
    """Plotly's own objects (a template) and arrays as JSON."""
    return value.to_plotly_json() if hasattr(value, "to_plotly_json") else value.tolist()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{kind}">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _side(table: Table, *, marked: Callable[[Sequence[str]], list[bool]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *table.columns))
    lines = []
    for name, cells in table.rows:
        if marked is _never and len(set(cells)) == 1:
            lines.append(
                f'<tr><td>{escape(name)}</td><td colspan="{len(cells)}">{escape(cells[0])}</td></tr>'
            )
            continue
        shown = "".join(
            f'<td class="differs">{escape(cell)}</td>' if differs else f"<td>{escape(cell)}</td>"
            for cell, differs in zip(cells, marked(cells), strict=True)
        )
        lines.append(f"<tr><td>{escape(name)}</td>{shown}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table class="side">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _side_or_none(title: str, table: Table) -> str:
    body = _side(table, marked=_unlike_first) if table.rows else "<p>None.</p>"
    return f"<h2>{escape(title)}</h2>\n{body}"


def _never(cells: Sequence[str]) -> list[bool]:
    """Marks nothing: facts of runs are not differences. A fact that all runs share is written once."""
    return [False] * len(cells)


def _unlike_first(cells: Sequence[str]) -> list[bool]:
    """Which cells differ from the baseline's, the first."""
    return [cell != cells[0] for cell in cells]


def _shortened(comparison: Comparison) -> tuple[str, Comparison]:
    """What all names have in common at both ends (``demo-*-seed1``), and the comparison without it."""
    names = [result.run.name for result in comparison.results]
    begin = shared_beginning(names)
    end = shared_beginning([name[len(begin) :][::-1] for name in names])[::-1]
    short = {name: name[len(begin) : len(name) - len(end)] for name in names}
    if not begin + end or not all(short.values()):
        return "", comparison
    results = tuple(
        replace(result, run=replace(result.run, name=short[result.run.name]))
        for result in comparison.results
    )
    return f"{begin}*{end}", replace(comparison, results=results)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
