"""The gap to a baseline while a run goes on: at each evaluation, at the tokens it has seen by then.

The baseline is a run's folder or a run on wandb, finished or still running (then its rows are read again as
they grow). It must be the same experiment but for the recipe: another seed, order of data, learning rate
or length is refused, since the gap would be theirs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fp4pretrain.baseline import WandbPath
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import HARMLESS, differing, digests, within
from fp4pretrain.naming import flat
from fp4pretrain.report.baselines import FolderSource, Source, WandbSource
from fp4pretrain.report.endpoint import curve_of
from fp4pretrain.report.equal_loss import equal_loss
from fp4pretrain.report.gap import match
from fp4pretrain.report.load import Run

_SHOWN = 4


class LiveGap:
    """A baseline's validation losses to hold those of a run against.

    Args:
        baseline: the run_dir of the baseline, or its place on wandb.
        fingerprint: the run's own, as ``fingerprint.whole`` makes it.

    Raises:
        UserError: for a baseline that cannot be read, or that differs in more than the recipe.
    """

    def __init__(self, baseline: Path | WandbPath, fingerprint: Mapping[str, Any]) -> None:
        self._source: Source = (
            FolderSource(baseline) if isinstance(baseline, Path) else WandbSource(baseline)
        )
        _refuse_other(self._source, fingerprint)

    def at(self, tokens: float, losses: Mapping[str, Any]) -> dict[str, float]:
        """``gap`` of val_loss and ``gap_bf16`` of val_loss_bf16, relative (0.01: 1% above the baseline),
        and ``baseline_val_loss``; nothing where the baseline has no evaluation around these tokens."""
        self._source.refresh(tokens)
        found: dict[str, float] = {}
        for key, name in (("val_loss", "gap"), ("val_loss_bf16", "gap_bf16")):
            theirs = self._loss(key, tokens)
            if key in losses and theirs is not None:
                found[name] = losses[key] / theirs - 1
                if key == "val_loss":
                    found["baseline_val_loss"] = theirs
        return found

    def final(self, run: Run) -> dict[str, float]:
        """Of a run that ended, as far as its curves and the baseline's tell, in per cent: ``gap_percent``
        at the last common tokens, and ``extra_tokens_percent`` that it needs for the baseline's loss."""
        theirs = self._source.run
        found: dict[str, float] = {}
        matched = match(run.val_loss, theirs.val_loss)
        if matched is not None:
            found["gap_percent"] = 100 * float(matched.run[-1] / matched.baseline[-1] - 1)
        extra = equal_loss([(run, theirs)]).extra
        if extra is not None:
            found["extra_tokens_percent"] = 100 * extra
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def differences(self, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
        """Key, the baseline's value and the run's, of every key of the recipe and of what shapes the
        curve in which the configs differ."""
        found = differing(flat(self._source.run.config), flat(config))
        return [
            (key, str(there), str(here))
            for key, (there, here) in found.items()
            if not within(key, HARMLESS)
        ]

    def _loss(self, key: str, tokens: float) -> float | None:
        """The baseline's loss at so many tokens, on a line between its evaluations."""
        curve = curve_of(self._source.run, key)
        if not len(curve) or not curve.tokens[0] <= tokens <= curve.tokens[-1]:
            return None
        value = float(np.interp(tokens, curve.tokens, curve.values))
        return value if math.isfinite(value) else None


def _refuse_other(source: Source, ours: Mapping[str, Any]) -> None:
    run = source.run
    if run.fingerprint is None:
        raise UserError(
            f"baseline: {source.name} has no fingerprint to compare with; train it again with this version"
        )
    if run.changes:
        changed = ", ".join(f"{key}: {change}" for key, change in run.changes.items())
        raise UserError(
            f"baseline: {source.name} was resumed as another experiment ({changed}); choose another one"
        )
    theirs = run.fingerprint
    found = differing(theirs["entries"], ours["entries"])
    found |= differing(digests(theirs["data"]), digests(ours["data"]))
    told = [f"{key} ({there} there, {here} here)" for key, (there, here) in found.items()]
    if told:
        more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise UserError(
            f"baseline: {source.name} differs in more than the recipe: {', '.join(told[:_SHOWN])}"
            f"{more}; give this run the same settings, or choose another baseline"
        )
    if theirs["plan"] == ours["plan"]:
        raise UserError(
            f"baseline: {source.name} has this run's own recipe; choose another baseline or precision"
        )
