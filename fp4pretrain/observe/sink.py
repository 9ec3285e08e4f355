"""Where numbers go: one row at a time, into any number of places.

A row is a flat dict of one event: ``{"event": "train", "step": 7, "tokens": 57344, "loss": 4.2,
...}`` or ``{"event": "eval", ..., "val_loss": 4.3}``. Every sink takes the same rows, so a number
that is in one place is in all of them. Only one rank of a run makes sinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Row = Mapping[str, Any]


class Sink(Protocol):
    """A place that rows are written to."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class CompositeSink:
    """Several sinks as one, written to in their order and closed in the reverse."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def write(self, row: Row) -> None:
        """Hand the row to every sink."""
        for sink in self.sinks:
            sink.write(row)

    def close(self) -> None:
        """Close every sink."""
        for sink in reversed(self.sinks):
            sink.close()
