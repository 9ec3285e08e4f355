"""What a comparison found, as numbers and as the table that is its judgement in one look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fp4pretrain.report.differences import Difference
from fp4pretrain.report.gap import MatchedCurves
from fp4pretrain.report.load import FloatArray, Run


@dataclass(frozen=True)
class Score:
    """One loss of one run, and its relative gap to the baseline at the same tokens.

    ``error``: the gap's standard error over seeds; None for one seed.
    """

    loss: float
    gap: float | None  # None for the baseline itself
    error: float | None = None


@dataclass(frozen=True)
class Result:
    """One row of the comparison. ``tokens``: where its losses were taken, the last common ones.

    ``run``: the mean of the runs of all ``seeds``. ``band``: standard error of the training loss's
    gap on the matched tokens; None for one seed.
    """

    run: Run
    seeds: tuple[str, ...]
    tokens: float
    loss: Score
    val_loss: Score | None
    val_loss_bf16: Score | None
    tokens_per_second: float | None
    matched: MatchedCurves | None  # training loss; None for the baseline itself
    band: FloatArray | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; the baseline's result comes first."""

    results: tuple[Result, ...]
    window: int
    differences: tuple[Difference, ...]
    unigram_entropy: float | None
    picture: Path
    page: Path | None

    @property
    def baseline(self) -> Result:
        """The result that the others are measured against."""
        return self.results[0]

    def header(self) -> list[str]:
        """Names of the table's columns; a column that no run has a number for is left out."""
        return [name for name, _ in self._columns()]

    def cells(self) -> list[list[str]]:
        """The table as text, one list a run."""
        columns = [cells for _, cells in self._columns()]
        return [list(row) for row in zip(*columns, strict=True)]

    def notes(self) -> list[str]:
        """How the numbers were made, and what to hold against them; one sentence each."""
        notes = [
            f"Gap: loss against {self.baseline.run.name} at the same tokens (interpolated), in %. "
            f"Training loss: mean of the last {self.window} logged rows; validation: last common."
        ]
        if len(self.baseline.seeds) > 1:
            notes.append(
                f"Means over seeds {', '.join(self.baseline.seeds)}; ± is the standard error of the "
                "gap, from pairs of runs of one seed."
            )
        ends = {result.tokens for result in self.results}
        if len(ends) > 1:
            notes.append("Runs end at different tokens: each gap is taken where its run ends.")
        unequal = sorted({one.key for one in self.differences if not one.harmless})
        if unequal:
            notes.append(f"FORCED: the runs also differ in {', '.join(unequal)}.")
        for run in (result.run for result in self.results):
            if run.events:
                told = ", ".join(f"{count} x {event}" for event, count in run.events.items())
                notes.append(f"What happened to {run.name}: {told}.")
        if self.unigram_entropy is not None:
            notes.append(f"Unigram entropy of the data: {self.unigram_entropy:.4f} nats.")
        return notes

    def table(self) -> Table:
        """The comparison as a rich table."""
        title = f"Loss gap at matched tokens, baseline {self.baseline.run.name}"
        # narrow enough for 80 columns: two-line headers, no rules between columns
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.caption, table.caption_justify = "\n".join(self.notes()), "left"
        for number, name in enumerate(self.header()):
            header = name.replace(" ", "\n")
            if number == 0:
                table.add_column(header, min_width=8, overflow="fold")
            else:
                table.add_column(header, justify="right", no_wrap=True)
        for row in self.cells():
            table.add_row(*(cell.replace(" ± ", "\n± ") for cell in row))
        return table

    def _columns(self) -> list[tuple[str, list[str]]]:
        results = self.results
        columns = [
            ("run", [result.run.name for result in results]),
            ("tokens", [tokens_text(result.tokens) for result in results]),
        ]
        scores: dict[str, list[Score | None]] = {
            "train loss": [result.loss for result in results],
            "val loss": [result.val_loss for result in results],
            "val BF16": [result.val_loss_bf16 for result in results],
        }
        for name, found in scores.items():
            if any(found):
                columns.append((name, ["-" if one is None else _loss(one.loss) for one in found]))
                columns.append(("gap %", ["" if one is None else gap_text(one) for one in found]))
        rates = [result.tokens_per_second for result in results]
        if any(rates):
            columns.append(
                ("tokens/s", ["-" if rate is None else f"{rate:,.0f}" for rate in rates])
            )
        return columns


def tokens_text(tokens: float) -> str:
    """Tokens to three digits: 983K, 1.05M, 26.2B, 1T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= 0.9995 * size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def gap_text(score: Score) -> str:
    """The gap in per cent, with its standard error where there is one."""
    if score.gap is None:
        return ""
    if not math.isfinite(score.gap):
        return "-"
    error = "" if score.error is None else f" ± {100 * score.error:.2f}"
    return f"{100 * score.gap:+.2f}{error}"
