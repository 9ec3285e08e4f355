"""What a comparison found, as numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fp4pretrain.report.differences import Difference
from fp4pretrain.report.endpoint import Gap
from fp4pretrain.report.equal_loss import EqualLoss
from fp4pretrain.report.gap import MatchedCurves
from fp4pretrain.report.load import FloatArray, Run
from fp4pretrain.report.tuning import Tuning

ENDPOINTS = {"val_loss": "val", "val_loss_bf16": "BF16", "loss": "train"}


@dataclass(frozen=True)
class Result:
    """One row of the comparison. ``tokens``: where its losses were taken, the last common ones.

    ``run``: the mean of the runs of all ``seeds``. ``losses``: the last loss of each curve.
    ``gaps``: to the baseline, by curve; empty for the baseline itself. ``band``: half the interval of
    the training loss's gap on the matched tokens; None for one pair. ``diverged``: names of runs.
    """

    name: str
    run: Run
    seeds: tuple[int | str, ...]
    tokens: float
    losses: Mapping[str, float]
    tokens_per_second: float | None
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    equal_loss: EqualLoss | None = None
    matched: MatchedCurves | None = None  # training loss; None for the baseline itself
    band: FloatArray | None = None
    diverged: tuple[str, ...] = ()

    @property
    def gap(self) -> Gap | None:
        """The gap that is judged: of the validation loss where there is one."""
        return self.gaps.get("val_loss") or self.gaps.get("loss")


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; the baseline's result comes first. ``window``: points of the training
    loss in a mean, of ``averaged`` logged rows. ``remarks``: what was left out, and
    why; one sentence each."""

    results: tuple[Result, ...]
    window: int
    averaged: int
    differences: tuple[Difference, ...]
    tuning: Mapping[str, Tuning]
    unigram_entropy: float | None
    remarks: tuple[str, ...]
    picture: Path
    page: Path | None

    @property
    def baseline(self) -> Result:
        """The result that the others are measured against."""
        return self.results[0]

    @property
    def common_tokens(self) -> float | None:
        """Where all losses were taken; None where that differs."""
        tokens = {result.tokens for result in self.results}
        return tokens.pop() if len(tokens) == 1 else None

    @property
    def title(self) -> str:
        """What the table is about."""
        at = "matched" if self.common_tokens is None else tokens_text(self.common_tokens)
        return f"Loss gap at {at} tokens, baseline {self.baseline.run.name}"

    def header(self) -> list[str]:
        """Names of the table's columns; a column that no run has a number for is left out."""
        return [name for name, _ in self._columns()]

    def cells(self) -> list[list[str]]:
        """The table as text, one list a run."""
        columns = [cells for _, cells in self._columns()]
        return [list(row) for row in zip(*columns, strict=True)]

    def _columns(self) -> list[tuple[str, list[str]]]:
        results = self.results
        main = "val_loss" if any("val_loss" in one.losses for one in results) else "loss"
        columns = [("run", [one.run.name for one in results])]
        if self.common_tokens is None:
            columns.append(("tokens", [tokens_text(one.tokens) for one in results]))
        columns += [
            (f"{ENDPOINTS[main]} loss", [_loss(one, main) for one in results]),
            ("gap %", [gap_text(one.gaps.get(main)) for one in results]),
            ("nats", [nats_text(one.gaps.get(main)) for one in results]),
            ("verdict", [_verdict(one) for one in results]),
        ]
        if any("val_loss_bf16" in one.gaps for one in results):
            gaps = [gap_text(one.gaps.get("val_loss_bf16")) for one in results]
            columns.append(("BF16 gap %", gaps))
        if any(one.equal_loss and one.equal_loss.extra is not None for one in results):
            columns.append(("extra tokens %", [_extra(one.equal_loss) for one in results]))
        rates = [one.tokens_per_second for one in results]
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


def gap_text(gap: Gap | None) -> str:
    """The gap in per cent, with half its interval where there is one."""
    if gap is None:
        return ""
    if not math.isfinite(gap.gap):
        return "-"
    around = "" if gap.relative is None else f" ± {100 * gap.relative.half:.2f}"
    return f"{100 * gap.gap:+.2f}{around}"


def nats_text(gap: Gap | None) -> str:
    """The gap in nats a token, with half its interval where there is one."""
    if gap is None:
        return ""
    if not math.isfinite(gap.nats):
        return "-"
    around = "" if gap.absolute is None else f" ± {gap.absolute.half:.4f}"
    return f"{gap.nats:+.4f}{around}"


def _loss(result: Result, name: str) -> str:
    value = result.losses.get(name)
    if value is None:
        return "-"
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _verdict(result: Result) -> str:
    if result.diverged:
        return "diverged"
    return "" if result.gap is None else result.gap.verdict


def _extra(found: EqualLoss | None) -> str:
    if found is None:
        return ""
    if found.extra is None:
        return "-"
    around = "" if found.interval is None else f" ± {100 * found.interval.half:.1f}"
    return f"{100 * found.extra:+.1f}{around}"
