"""Where a baseline's rows come from while a run goes on: from its folder, or from its wandb run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fp4pretrain.baseline import WandbPath
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import ORDER, VALIDATION, entries
from fp4pretrain.observe.wandb_runs import WandbRun, fetch
from fp4pretrain.report.load import ENDPOINTS, Curve, Run, load_run
from fp4pretrain.stored import config_from

# Keys of wandb's config that are not the run config's (``train.sinks`` adds them).
_BESIDE = ("fingerprint", "plan", "fingerprint_data", "changes")


class Source(Protocol):
    """``name``: as messages say it. ``run``: the baseline as far as it is known."""

    name: str
    run: Run

    def refresh(self, tokens: float) -> None:
        """Look for rows that came since, which may reach ``tokens``."""


class FolderSource:
    """A run's folder. Raises UserError for one that holds no run."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._read = self._stamp()  # before the rows: what comes while they are read is news
        self.run = self._load()

    def refresh(self, tokens: float) -> None:
        """Read the folder again where its rows grew."""
        stamp = self._stamp()
        if stamp != self._read:
            self._read, self.run = stamp, self._load()

    def _load(self) -> Run:
        try:
            return load_run(self._path, name=self._path.name)
        except UserError as error:
            raise UserError(f"baseline: {error}") from None

    def _stamp(self) -> tuple[int, int]:
        rows = self._path / "metrics.jsonl"
        if not rows.is_file():
            return 0, 0  # no run's folder, as loading says
        found = rows.stat()
        return found.st_mtime_ns, found.st_size


class WandbSource:
    """A run on wandb. Raises UserError where it cannot be read."""

    def __init__(self, path: WandbPath) -> None:
        self.name = str(path)
        self._path = path
        self._fetch()

    def refresh(self, tokens: float) -> None:
        """Ask the server, only for a run that goes on and has not come so far. A server that does not
        answer leaves the rows as they were, and costs one line."""
        reached = self.run.val_loss.tokens[-1] if len(self.run.val_loss) else -1.0
        if not self._going or reached >= tokens:
            return
        try:
            self._fetch()
        except UserError as error:
            print(f"warning: {error}", flush=True)

    def _fetch(self) -> None:
        found = fetch(self._path, ENDPOINTS)
        self.run, self._going = _as_run(found, self._path), found.going


def _as_run(found: WandbRun, path: WandbPath) -> Run:
    config = {key: value for key, value in found.config.items() if key not in _BESIDE}
    nothing = Curve(np.zeros(0), np.zeros(0))
    return Run(
        name=found.name,
        path=Path(path.path),
        config=config,
        plan=None,
        unigram_entropy=None,
        loss=nothing,
        val_loss=_curve(found.curves["val_loss"]),
        val_loss_bf16=_curve(found.curves["val_loss_bf16"]),
        tokens_per_second=nothing,
        val_parts={},
        fingerprint=_fingerprint(found.config, config, path),
        changes={key: str(told) for key, told in (found.config.get("changes") or {}).items()},
        events={},
    )


def _fingerprint(
    told: Mapping[str, Any], config: Mapping[str, Any], path: WandbPath
) -> dict[str, Any] | None:
    """The fingerprint that the run's folder has, made from the config on wandb. None where wandb was given
    none."""
    data = told.get("fingerprint_data")
    if not isinstance(data, Mapping) or not {ORDER, VALIDATION} <= data.keys():
        return None
    made = entries(config_from(config, str(path)))
    return {"entries": made, "data": dict(data), "plan": told.get("plan")}


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """A curve of rows. Where two rows have the same tokens, the later one counts."""
    values = dict(points)
    return Curve(np.array([*values]), np.array([*values.values()]))
