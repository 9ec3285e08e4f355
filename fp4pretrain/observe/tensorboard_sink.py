"""TensorBoard's event files, by torch's writer (``pip install 'fp4pretrain[tensorboard]'``).

Where TensorBoard says step, these files have tokens: runs of other batch sizes lie on one axis, as they do
everywhere else. A run that is resumed, or goes back, repeats what comes after its checkpoint: the first event
of a new file says from where on the earlier ones are void, so a reader has each point once.

``tensorboard --logdir runs`` shows all runs of a folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from fp4pretrain.errors import UserError, first_line
from fp4pretrain.observe.about import About, Table
from fp4pretrain.observe.sink import DECIDED, HAPPENED, Row
from fp4pretrain.observe.sites import scale_shares

FOLDER = "tensorboard"
INSTALL = "pip install 'fp4pretrain[tensorboard]'"
_HIDDEN = ("event", "tokens", "time", "count")


def check_installed() -> None:
    """Raises UserError where the package is missing."""
    if find_spec("tensorboard") is None:
        raise UserError(
            f"logging.tensorboard: the package tensorboard is missing; {INSTALL}, or leave "
            "logging.tensorboard out"
        )


class TensorBoardSink:
    """Write rows as scalars, events as text too, and the observers' scales as histograms.

    ``resume_tokens``: of the checkpoint that a run goes on from; None begins anew, and what is in the folder
    is void. Logging must never end a training run: what goes wrong later costs one line.
    """

    def __init__(self, folder: Path, about: About, resume_tokens: int | None = None) -> None:
        self._folder = folder
        self._about = about
        self._events: list[Row] = []
        self._tokens = resume_tokens or 0
        self._went_back = False
        self._writer: Any = self._opened(0 if resume_tokens is None else resume_tokens + 1)
        if resume_tokens is None or about.changed:
            for name, table in about.tables.items():
                self._writer.add_text(name, _markdown(table), self._tokens)

    def write(self, row: Row) -> None:
        """Log a row at its tokens."""
        if self._writer is None:
            return
        try:
            if self._went_back:
                self._void(row["tokens"])
            self._tokens = row["tokens"]
            self._write(row)
        except Exception as error:  # any failure of a logger: say it once, train on
            self._give_up(error)

    def rewind(self, step: int) -> None:
        """Mark the events after ``step`` as void, since the run repeats those steps."""
        self._went_back = True

    def summarize(self, values: Mapping[str, float]) -> None:
        """The table of TensorBoard's HPARAMS, by which runs are sorted."""
        if self._writer is not None:
            known = {"recipe": " ".join(self._about.tags)}
            try:
                self._writer.add_hparams(
                    known, dict(values), run_name=".", global_step=self._tokens
                )
            except Exception as error:  # as in write
                self._give_up(error)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:  # as in write: a full disk often shows here alone
                self._give_up(error)
            self._writer = None

    def _give_up(self, error: Exception) -> None:
        print(f"tensorboard: stopped ({first_line(error)}); metrics.jsonl goes on", flush=True)
        self._writer = None

    def _opened(self, void_from: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # needs the package

        return SummaryWriter(str(self._folder), purge_step=void_from)

    def _void(self, tokens: int) -> None:
        """Mark what was written from these tokens on as void, but for the events that say why the run went
        back."""
        self._went_back = False
        self._writer.close()
        self._writer = self._opened(tokens)
        for row in self._events:
            if row["tokens"] >= tokens:
                self._write_event(row)

    def _write(self, row: Row) -> None:
        if row.get("event") in DECIDED | HAPPENED:
            self._events.append(row)
            self._write_event(row)
            return
        for key, value in row.items():
            if isinstance(value, Real) and key not in _HIDDEN:
                self._writer.add_scalar(key, float(value), row["tokens"])
        for operand, counts in scale_shares(row.get("observed") or {}).items():
            self._write_scales(f"observe/scales/{operand}", counts, row["tokens"])

    def _write_event(self, row: Row) -> None:
        name = f"events/{row['event']}"
        said = ", ".join(f"{key} {value}" for key, value in row.items() if key not in _HIDDEN)
        self._writer.add_scalar(name, float(row.get("count", 1)), row["tokens"])
        self._writer.add_text(name, said, row["tokens"])

    def _write_scales(self, name: str, counts: Mapping[int, float], tokens: int) -> None:
        """A bucket an octave; its height is the share of blocks, summed over linears."""
        octaves = range(min(counts), max(counts) + 1)
        shares = [counts.get(octave, 0.0) for octave in octaves]
        middles = [octave + 0.5 for octave in octaves]
        self._writer.add_histogram_raw(
            name,
            min=octaves[0],
            max=octaves[-1] + 1,
            num=math.fsum(shares),
            sum=_dot(shares, middles),
            sum_squares=_dot(shares, [middle**2 for middle in middles]),
            bucket_limits=[octave + 1 for octave in octaves],
            bucket_counts=shares,
            global_step=tokens,
        )


def _dot(left: list[float], right: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def _markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("|" + "|".join(map(str, row)) + "|" for row in rows)
