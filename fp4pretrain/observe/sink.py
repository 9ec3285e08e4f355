"""Where numbers go: one row at a time, into any number of places.

A row is a flat dict of one event: ``{"event": "train", "step": 7, "tokens": 57344, "loss": 4.2,
...}`` or ``{"event": "eval", ..., "val_loss": 4.3}``. Every sink takes the same rows, so a number
that is in one place is in all of them. Only one rank of a run makes sinks.

Two kinds of row record an event and measure nothing. A decision (a skipped step, a spike, a rollback,
a trigger) follows from the run: a run that is resumed at an earlier step makes that decision again.
An accident of a process (a hang, a failed save) does not repeat. Such a row may hold ``count``, the
number of such events so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Row = Mapping[str, Any]

STOPPED = "stopped"  # the guard gave up
DECIDED = frozenset({"skipped", "spike", "rollback", STOPPED, "trigger"})
HAPPENED = frozenset({"hang", "save_failed"})


class Sink(Protocol):
    """A place that rows are written to."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def rewind(self, step: int) -> None:
        """The run went back to ``step`` and repeats what comes after it; its row is written already."""

    def summarize(self, values: Mapping[str, float]) -> None:
        """Take the numbers of the finished run that runs are sorted by. They follow from the rows, so a
        place that keeps all rows has them."""

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

    def rewind(self, step: int) -> None:
        """Tell every sink."""
        for sink in self.sinks:
            sink.rewind(step)

    def summarize(self, values: Mapping[str, float]) -> None:
        """Hand the numbers to every sink."""
        for sink in self.sinks:
            sink.summarize(values)

    def close(self) -> None:
        """Close every sink."""
        for sink in reversed(self.sinks):
            sink.close()
