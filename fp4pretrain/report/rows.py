"""The rows of a metrics file, as many as a page needs: a run of millions of rows is read in seconds.

Of training rows, the mass of a file, only steps, tokens and losses are read, those of all rows at once and
without a Python object a row; some of them, and every other line, are parsed as JSON. Where there are more
than ``POINTS`` training rows, neighbouring ones are averaged, so that a point stands for the mean of the
losses around it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fp4pretrain.errors import UserError
from fp4pretrain.observe.jsonl import parsed

POINTS = 4000
_SAMPLES = 1000  # training rows that are read whole, in a file that has more than POINTS
_TRAIN = b'{"event": "train", '
_WIDTH = 112  # bytes of a line in which step, tokens and loss stand
_FIELDS = (b'"step": ', b', "tokens": ', b', "loss": ')
_DIGITS = 18  # of a number that an int64 holds
_POINT = 256  # above any length of a number
_PIECE = 1 << 20  # bytes that are looked at together
_ROWS = 1 << 14  # lines whose beginnings are read together: 2 MB
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Rows:
    """``steps``, ``tokens``, ``losses`` of the training rows [rows]; ``others``: all other rows; and
    ``samples``: training rows with all their fields, evenly spaced (all, where there are few)."""

    steps: FloatArray
    tokens: FloatArray
    losses: FloatArray
    others: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def read(path: Path) -> Rows:
    """All rows of a metrics file; a last line without its newline is an interrupted write and left out.

    Raises ``UserError`` for a line that is no JSON object.
    """
    text = _padded(path)
    ends = _newlines(text)
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1] + 1])

    def lines(chosen: IntArray) -> list[bytes]:
        pairs = zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)
        return [text[start:end].tobytes() for start, end in pairs]

    train, columns = _training(text, starts, ends)
    plain = ~np.isnan(columns).any(axis=0)
    odd = train[~plain]
    try:
        columns[:, ~plain] = [_column(lines(odd), name) for name in (b"step", b"tokens", b"loss")]
    except ValueError:  # a training row without them
        train, columns = train[:0], columns[:, :0]
    rest = np.setdiff1d(np.arange(len(ends)), train, assume_unique=True)
    every = 1 if len(train) <= POINTS else -(-len(train) // _SAMPLES)
    chosen = np.union1d(np.arange(every - 1, len(train), every), np.arange(len(train))[-1:])
    try:
        others = _rows(lines(rest))
        samples = _rows(lines(train[chosen]))
    except ValueError:
        raise _broken(path, lines(np.arange(len(ends)))) from None
    return Rows(columns[0], columns[1], columns[2], others, samples)


def block_means(values: FloatArray, size: int) -> FloatArray:
    """Means of ``size`` neighbours [rows / size, rounded up]; a value that is no number makes its mean
    none."""
    if size == 1 or not len(values):
        return values
    starts = np.arange(0, len(values), size)
    counts = np.diff([*starts, len(values)])
    means: FloatArray = np.add.reduceat(values, starts) / counts
    return means


def block_ends(values: FloatArray, size: int) -> FloatArray:
    """The last of ``size`` neighbours each."""
    if size == 1 or not len(values):
        return values
    ends = np.minimum(np.arange(size - 1, len(values) + size - 1, size), len(values) - 1)
    return values[ends]


def _padded(path: Path) -> ByteArray:
    """The bytes of a file, and ``_WIDTH`` zeros, so that a window of that width begins at any of them."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        held = bytearray(size + _WIDTH)
        file.readinto(memoryview(held)[:size])
    return np.frombuffer(held, dtype=np.uint8)


def _newlines(text: ByteArray) -> IntArray:
    """Where the newlines stand. The text is searched piece by piece, so that a piece stays in the cache."""
    pieces = range(0, len(text), _PIECE)
    found = [np.flatnonzero(text[at : at + _PIECE] == ord("\n")) + at for at in pieces]
    return np.concatenate(found)


def _training(text: ByteArray, starts: IntArray, ends: IntArray) -> tuple[IntArray, FloatArray]:
    """Which lines are training rows, and their steps, tokens and losses [3, rows].

    A run writes the three first and in this order. NaN stands for all three of a row that says one of them
    in another way (NaN, 1e-05), elsewhere, or behind ``_WIDTH``.
    """
    windows = sliding_window_view(text, _WIDTH)
    whole = text[ends - 1] == ord("}")
    train, columns = [], []
    for first in range(0, len(starts), _ROWS):
        begins = windows[starts[first : first + _ROWS]]  # close together in memory
        chosen = np.flatnonzero(_says(begins, 0, _TRAIN) & whole[first : first + _ROWS])
        train.append(chosen + first)
        columns.append(_numbers(begins[chosen], len(_TRAIN), _FIELDS))
    if not train:
        return np.zeros(0, dtype=np.int64), np.zeros((3, 0))
    return np.concatenate(train), np.concatenate(columns, axis=1)


def _numbers(begins: ByteArray, at: int, fields: Sequence[bytes]) -> FloatArray:
    """The numbers [fields, rows] behind the names of fields that follow each other, the first at column
    ``at`` of each row; NaN in a row that has not all of them so. Exact but for the last bit.

    Numbers have few lengths (a step grows a digit in ten times as many rows), so rows whose number is of
    one length are read together, column by column.
    """
    at += len(fields[0])
    lengths, points = _lengths(begins, at)
    kinds = np.where(_says(begins, at - len(fields[0]), fields[0]), _POINT * points + lengths, 0)
    found = np.full((len(fields), len(begins)), np.nan)
    for kind in np.flatnonzero(np.bincount(kinds)).tolist():
        point, length = divmod(kind, _POINT)
        digits = length - (point > 0)
        if not 0 < digits <= _DIGITS or at + length >= begins.shape[1]:
            continue
        alike = np.flatnonzero(kinds == kind)
        rows = begins if len(alike) == len(begins) else begins[alike]
        if len(fields) > 1:
            behind = _numbers(rows, at + length, fields[1:])
            good = ~np.isnan(behind[0])
            found[1:, alike] = behind
        else:
            good = (rows[:, at + length] == ord(",")) | (rows[:, at + length] == ord("}"))
        values = _decimals(rows, at, length, point=point)
        found[0, alike] = np.where(good, values, np.nan)
    return found


def _says(begins: ByteArray, at: int, words: bytes) -> BoolArray:
    """Whether these bytes stand at a column of each row."""
    if at + len(words) > begins.shape[1]:
        return np.zeros(len(begins), dtype=bool)
    found = np.ones(len(begins), dtype=bool)
    for offset, byte in enumerate(words):
        found &= begins[:, at + offset] == byte
    return found


def _lengths(begins: ByteArray, at: int) -> tuple[IntArray, IntArray]:
    """How many digits, with or without a point, stand at a column of each row; and where among them the
    point stands, counted from 1 (0: there is none)."""
    lengths, points = (np.zeros(len(begins), dtype=np.uint8) for _ in range(2))
    going = np.ones(len(begins), dtype=bool)
    for place, column in enumerate(range(at, begins.shape[1]), start=1):
        byte = begins[:, column].copy()
        is_point = (byte == ord(".")) & (points == 0)
        going &= (byte - np.uint8(ord("0")) <= 9) | is_point  # wraps: no digit is above 9
        if not going.any():
            break
        lengths += going
        np.copyto(points, place, where=going & is_point, casting="unsafe")
    return lengths.astype(np.int64), points.astype(np.int64)


def _decimals(begins: ByteArray, at: int, length: int, *, point: int) -> FloatArray:
    """The numbers of ``length`` characters at a column of each row; ``point``: as of ``_lengths``."""
    whole = np.zeros(len(begins), dtype=np.int64)
    for place in range(1, length + 1):
        if place != point:
            whole *= 10
            whole += begins[:, at + place - 1]
            whole -= ord("0")
    found: FloatArray = whole / 10.0 ** (length - point if point else 0)
    return found


def _column(lines: Sequence[bytes], name: bytes) -> FloatArray:
    """The numbers of one field; ValueError where a line has none. Numbers that are not finite are quoted
    words: "NaN", "Infinity"."""
    mark = b'"%b": ' % name
    texts = [line.partition(mark)[2].partition(b",")[0] for line in lines]
    try:
        return np.array([float(text) for text in texts])
    except ValueError:
        return np.array([float(text.rstrip(b"}").strip(b'"')) for text in texts])


def _rows(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The rows of lines; ValueError for one that is no JSON object."""
    rows = json.loads(b"[" + b",".join(lines) + b"]")  # all at once, in half the time
    if len(rows) != len(lines) or not all(isinstance(row, dict) for row in rows):
        raise ValueError
    return [parsed(row) for row in rows]


def _broken(path: Path, lines: Sequence[bytes]) -> UserError:
    """Names the first line that is no JSON object."""
    for number, line in enumerate(lines, start=1):
        try:
            _rows([line])
        except ValueError:
            return UserError(f"{path}: line {number} is no JSON object; delete it or rerun the run")
    raise AssertionError("a line was broken before")
