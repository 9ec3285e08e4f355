"""``metrics.jsonl``: the record of a run, one JSON object a line.

The file is what ``fp4pretrain compare`` reads, so it must hold each step once, whatever happened
to the run. A run that is resumed, or that went back to a checkpoint by itself, repeats the steps after
it, so their old rows are cut off; a row that a crash left half-written goes the same way. The record of
why it went back stays: see ``kept``.

JSON has no NaN. A diverged loss is written as the string ``"NaN"``, ``"Infinity"`` or
``"-Infinity"`` (the convention of protobuf's JSON mapping), which ``float`` takes back;
``read_rows`` does that. ``null`` stays free for "not known", such as the MFU of a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text
from fp4pretrain.observe.sink import DECIDED, HAPPENED, Row

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlSink:
    """Append rows to a JSONL file, each as it is written.

    A full disk ends no run: rows wait in memory until there is room again, and one line says so.

    ``resume_step`` is the step of the checkpoint a run goes on from: rows of later steps are cut
    off. ``None`` begins a new record, and one already there is kept beside it as
    ``metrics.1.jsonl``, ``metrics.2.jsonl``, ...
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if resume_step is None:
                _set_aside(self.path)
            else:
                _truncate_after(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, row: Row) -> None:
        """Append one line at once, so that a crash loses no finished row."""
        line = json.dumps(_plain(row), allow_nan=False) + "\n"
        self._append(self._waiting + line.encode())

    def rewind(self, step: int) -> None:
        """Cut off the rows of later steps, but for those that say why the run went back."""
        self._append(self._waiting)
        self._file.close()
        _truncate_after(self.path, step)
        self._file = self.path.open("ab", buffering=0)

    def summarize(self, values: Mapping[str, float]) -> None:
        """Write nothing: the rows hold the numbers already."""

    def close(self) -> None:
        """Close the file."""
        self._append(self._waiting)
        if self._waiting:
            rows = self._waiting.count(b"\n")
            print(f"warning: the last {rows} rows of {self.path} could not be written", flush=True)
        self._file.close()

    def _append(self, lines: bytes) -> None:
        waited = bool(self._waiting)
        try:
            while lines:
                lines = lines[self._file.write(lines) :]  # an unfinished line is finished later
        except OSError as error:
            if not waited:
                print(
                    f"warning: {self.path} cannot be written ({error.strerror}); rows wait in "
                    "memory until it can",
                    flush=True,
                )
        self._waiting = lines


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a metrics file, non-finite numbers as floats.

    A last line without its newline is the write that a crash interrupted: it is left out. Any
    other line that is no JSON object raises ``UserError``.
    """
    rows = []
    for number, line in enumerate(_finished_lines(Path(path)), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; delete it or rerun the run")
        rows.append(parsed(row))
    return rows


def parsed(row: Row) -> dict[str, Any]:
    """A row as it was written: non-finite numbers as floats."""
    words = {key: _NON_FINITE[value] for key, value in row.items() if _says_number(value)}
    return {**row, **words}


def kept(rows: Sequence[Row], step: int) -> list[bool]:
    """Which rows stay where a run goes on from ``step``.

    Three kinds stay: rows up to that step; rows of accidents; and rows of the guard's decisions from
    before a rollback to that step or an earlier one. The resumed run starts after that rollback, so it
    does not make those decisions again. It does make every later decision again.
    """
    back = [
        index
        for index, row in enumerate(rows)
        if row.get("event") == "rollback" and row["to_step"] <= step
    ]
    last = back[-1] if back else -1
    return [
        row.get("step", 0) <= step
        or row.get("event") in HAPPENED
        or (row.get("event") in DECIDED and index <= last)
        for index, row in enumerate(rows)
    ]


def _plain(value: Any) -> Any:
    """JSON types of the same value: tensors and NumPy scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _says_number(value: Any) -> bool:
    return isinstance(value, str) and value in _NON_FINITE


def _finished_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _truncate_after(path: Path, step: int) -> None:
    """Rewrite the file without the rows that are repeated, in one atomic replacement."""
    stay = kept(read_rows(path), step)
    lines = [line for line, stays in zip(_finished_lines(path), stay, strict=True) if stays]
    write_text(path, "".join(line + "\n" for line in lines))


def _set_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
