"""What a dashboard is told of a run beside its rows: words to filter by, and tables to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Text in columns; every row has as many cells as there are columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class About:
    """``tags``: short words, such as nvfp4. ``tables``: by name. ``files``: of the run's folder, to be kept
    with it. ``changed``: whether a run that was resumed goes on as another experiment, so that its tables
    are others than those told before."""

    tags: Sequence[str] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    files: Sequence[str] = ()
    changed: bool = False
