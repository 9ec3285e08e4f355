"""One self-contained HTML page of a comparison: it can be mailed, archived, opened offline.

Table, picture (embedded), each run's plan (what every GEMM computed), and all differences of the
configs. No script, no style sheet, no font from elsewhere.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fp4pretrain.files import write_text
from fp4pretrain.report.comparison import Comparison
from fp4pretrain.report.notes import notes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
.scores td:not(:first-child), .scores th:not(:first-child) { text-align: right; }
.differences td { font-family: ui-monospace, monospace; font-size: .85rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.3; }
img { max-width: 100%; } .notes { color: #555; } .unequal { color: #b00020; }
"""


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page; the picture must lie at ``comparison.picture``."""
    title = escape(comparison.title)
    parts = [
        f"<h1>{title}</h1>",
        _table(comparison.header(), comparison.cells(), kind="scores"),
        "".join(f'<p class="notes">{escape(note)}</p>' for note in notes(comparison)),
        _picture(comparison.picture),
        "<h2>Plans</h2>",
        *(_plan(result.run.name, result.run.plan) for result in comparison.results),
        "<h2>Differences from the baseline's config</h2>",
        _differences(comparison),
    ]
    body = "\n".join(parts)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n",
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table class="{kind}">\n<tr>{head}</tr>\n{body}\n</table>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="loss curves and their gap in per cent" src="data:image/png;base64,{data}">'


def _plan(name: str, plan: str | None) -> str:
    text = "this run left no plan.txt" if plan is None else plan.rstrip()
    return f"<h3>{escape(name)}</h3>\n<pre>{escape(text)}</pre>"


def _differences(comparison: Comparison) -> str:
    """The recipe's keys and the forced ones."""
    if not comparison.differences:
        return "<p>None.</p>"
    rows = [
        [one.run, one.key, one.baseline_value, one.run_value, "" if one.harmless else "not recipe"]
        for one in comparison.differences
    ]
    return _table(["run", "key", "baseline", "run's", ""], rows, kind="differences")
