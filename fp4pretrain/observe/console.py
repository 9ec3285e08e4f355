"""The console: a progress bar on a terminal, plain lines in a log file.

A bar shows where the run stands; a line is left for each evaluation and each event, so that
scrolling back tells the story. Without a terminal every row is one line, easy to grep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fp4pretrain.observe.sink import Row

_ORDER = (
    "loss",
    "val_loss",
    "val_loss_bf16",
    "gap",
    "gap_bf16",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
)
_LABELS = {
    "val_loss": "val",
    "val_loss_bf16": "val bf16",
    "grad_norm": "grad norm",
    "memory_gib": "GiB",
    "gap_bf16": "gap bf16",
}
# Series of many (observe/sqnr_db/wgrad.dy) are for charts.
_HIDDEN = ("event", "step", "tokens", "time")


class ConsoleSink:
    """Progress of a run from ``start_step`` to ``total_steps``.

    ``console`` defaults to standard output; it decides between bar and lines. The time left is
    that of the remaining steps at this process's own pace, all pauses included.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._first = start_step
        self._clock = clock
        self._start = clock()
        self._val_loss: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="")
            self._bar.start()

    def write(self, row: Row) -> None:
        """Show one row."""
        step = int(row.get("step", self._first))
        self._val_loss = row.get("val_loss", self._val_loss)
        if row.get("event") != "train":
            self._line(f"step {step}/{self._total}  {_event(row)}{_numbers(row)}")
            return
        left = self._eta(step)
        if self._bar is None or self._task is None:
            self._line(f"step {step}/{self._total}  {_numbers(row)}  eta {left}")
            return
        shown = {**row, "val_loss": self._val_loss}
        short = {key: shown.get(key) for key in ("loss", "val_loss", "lr", "tokens_per_second")}
        self._bar.update(self._task, completed=step, text=f"{_numbers(short)}  eta {left}")

    def rewind(self, step: int) -> None:
        """Count steps and pace from ``step`` on."""
        self._first, self._start = step, self._clock()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def summarize(self, values: Mapping[str, float]) -> None:
        """Print nothing: the lines above hold the numbers already."""

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        # soft_wrap: a line of a log file stays one line however narrow rich believes it to be.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _eta(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "?"
        seconds = (self._clock() - self._start) / done * (self._total - step)
        return str(timedelta(seconds=round(seconds)))


def _event(row: Row) -> str:
    """The name of an event, for rows whose numbers do not tell what happened."""
    return "" if row.get("event", "eval") == "eval" else f"{row['event']}  "


def _numbers(row: Row) -> str:
    """The known numbers in a fixed order, then whatever else the row of an event holds."""
    keys = [key for key in _ORDER if row.get(key) is not None]
    if row.get("event") not in (None, "train", "eval"):
        keys += [
            key
            for key, value in row.items()
            if not (key in _ORDER or key in _HIDDEN or "/" in key or isinstance(value, Mapping))
        ]
    return "  ".join(_number(key, row[key]) for key in keys)


def _number(key: str, value: Any) -> str:
    label = _LABELS.get(key, key)
    if key == "tokens_per_second":
        return f"{value:,.0f} tok/s"
    if key == "mfu":
        return f"mfu {value:.1%}"
    if key in ("gap", "gap_bf16"):
        return f"{label} {100 * value:+.2f}%"
    if key in ("loss", "val_loss", "val_loss_bf16"):
        return f"{label} {value:.4f}"
    return f"{label} {value:.3g}" if isinstance(value, float) else f"{label} {value}"
