"""The gap to a baseline while a run goes on: at each evaluation, at the tokens it has seen by then.

The baseline is the folder of a run, finished or still running (then its metrics are read again as they
grow). It must be the same experiment but for the recipe: another seed, order of data, learning rate or
length is refused, since the gap would be theirs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import differing, digests
from fp4pretrain.report.endpoint import curve_of
from fp4pretrain.report.load import Run, load_run

_SHOWN = 4


class LiveGap:
    """A baseline's validation losses to hold those of a run against.

    Args:
        baseline: the run_dir of the baseline.
        fingerprint: the run's own, as ``fingerprint.whole`` makes it.

    Raises:
        UserError: for a folder that holds no run, or one that differs in more than the recipe.
    """

    def __init__(self, baseline: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = baseline
        self._run = self._load()
        self._read = self._stamp()
        _refuse_other(self._run, fingerprint)

    def at(self, tokens: float, losses: Mapping[str, Any]) -> dict[str, float]:
        """``gap`` of val_loss and ``gap_bf16`` of val_loss_bf16, relative (0.01: 1% above the baseline),
        and ``baseline_val_loss``; nothing where the baseline has no evaluation around these tokens."""
        if self._stamp() != self._read:
            self._run, self._read = self._load(), self._stamp()
        found: dict[str, float] = {}
        for key, name in (("val_loss", "gap"), ("val_loss_bf16", "gap_bf16")):
            theirs = self._loss(key, tokens)
            if key in losses and theirs is not None:
                found[name] = losses[key] / theirs - 1
                if key == "val_loss":
                    found["baseline_val_loss"] = theirs
        return found

    def _loss(self, key: str, tokens: float) -> float | None:
        """The baseline's loss at so many tokens, on a line between its evaluations."""
        curve = curve_of(self._run, key)
        if not len(curve) or not curve.tokens[0] <= tokens <= curve.tokens[-1]:
            return None
        value = float(np.interp(tokens, curve.tokens, curve.values))
        return value if math.isfinite(value) else None

    def _load(self) -> Run:
        try:
            return load_run(self.path, name=self.path.name)
        except UserError as error:
            raise UserError(f"baseline: {error}") from None

    def _stamp(self) -> tuple[int, int]:
        found = (self.path / "metrics.jsonl").stat()
        return found.st_mtime_ns, found.st_size


def _refuse_other(run: Run, ours: Mapping[str, Any]) -> None:
    if run.fingerprint is None:
        raise UserError(
            f"baseline: {run.path} has no fingerprint.json to compare with; train it again with this "
            "version"
        )
    if run.changes:
        changed = ", ".join(f"{key}: {change}" for key, change in run.changes.items())
        raise UserError(
            f"baseline: {run.path} was resumed as another experiment ({changed}); choose another one"
        )
    theirs = run.fingerprint
    found = differing(theirs["entries"], ours["entries"])
    found |= differing(digests(theirs["data"]), digests(ours["data"]))
    told = [f"{key} ({there} there, {here} here)" for key, (there, here) in found.items()]
    if told:
        more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise UserError(
            f"baseline: {run.path} differs in more than the recipe: {', '.join(told[:_SHOWN])}"
            f"{more}; give this run the same settings, or choose another baseline"
        )
    if theirs["plan"] == ours["plan"]:
        raise UserError(
            f"baseline: {run.path} has this run's own recipe; choose another baseline or precision"
        )
