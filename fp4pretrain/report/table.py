"""A comparison as a table for the console, narrow enough for 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fp4pretrain.report.comparison import Comparison
from fp4pretrain.report.notes import notes


def table(comparison: Comparison) -> Table:
    """Headers and intervals take two lines; the notes are the caption."""
    found = Table(title=comparison.title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found.caption, found.caption_justify = "\n".join(notes(comparison)), "left"
    for number, name in enumerate(comparison.header()):
        header = name.replace(" ", "\n")
        if number == 0:
            found.add_column(header, min_width=8, overflow="fold")
        else:
            found.add_column(header, justify="right", no_wrap=True)
    for row in comparison.cells():
        found.add_row(*(cell.replace(" ± ", "\n± ") for cell in row))
    return found
