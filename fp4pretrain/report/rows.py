"""The rows of a metrics file, as many as a page needs: a run of millions of rows is read in seconds.

Of training rows, the mass of a file, only steps, tokens and losses are read, those of all rows at once and
without a Python object a row; some of them, and every other line, are parsed as JSON. Where there are more
than ``POINTS`` training rows, neighbouring ones are averaged, so that a point stands for the mean of the
losses around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
_LARGE = 10**17  # a whole number below has room for one more digit
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
    data = path.read_bytes()
    text = np.frombuffer(data + bytes(_WIDTH), dtype=np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1] + 1])
    # the beginnings of all lines, close together in memory
    begins = sliding_window_view(text, _WIDTH)[starts].ravel()
    of_training = _says(begins, _WIDTH * np.arange(len(ends)), _TRAIN)
    of_training &= text[ends - 1] == ord("}")

    def lines(chosen: IntArray) -> list[bytes]:
        pairs = zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)
        return [data[start:end] for start, end in pairs]

    train, rest = np.flatnonzero(of_training), np.flatnonzero(~of_training)
    try:
        columns = _columns(begins, _WIDTH * train, lambda odd: lines(train[odd]))
    except ValueError:  # a training row without them
        train, rest, columns = train[:0], np.arange(len(ends)), (np.zeros(0),) * 3
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


def _columns(
    text: ByteArray, starts: IntArray, lines: Callable[[IntArray], list[bytes]]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Steps, tokens and losses of the training rows that begin at ``starts``, all rows at once: a run
    writes them first and in this order. ``lines`` gives the rows that say a number in another way (NaN,
    1e-05), elsewhere, or behind ``_WIDTH``; ValueError where one has none."""
    at = starts + len(_TRAIN)
    columns, plain = [], np.ones(len(starts), dtype=bool)
    for before in (b'"step": ', b', "tokens": ', b', "loss": '):
        plain &= _says(text, at, before)
        numbers, at, found = _decimals(text, at + len(before))
        columns.append(numbers)
        plain &= found
    plain &= _says(text, at, b",") | _says(text, at, b"}")
    odd = np.flatnonzero(~plain)
    if len(odd):
        texts = lines(odd)
        for column, name in zip(columns, (b"step", b"tokens", b"loss"), strict=True):
            column[odd] = _column(texts, name)
    return columns[0], columns[1], columns[2]


def _says(text: ByteArray, at: IntArray, words: bytes) -> BoolArray:
    """Whether these bytes stand at each of the places."""
    found = at + len(words) <= len(text)
    for offset, byte in enumerate(words):
        found &= text.take(at + offset, mode="clip") == byte
    return found


def _decimals(text: ByteArray, at: IntArray) -> tuple[FloatArray, IntArray, BoolArray]:
    """The number at each place as far as it is digits with or without a point (exact but for the last bit),
    the place behind it, and whether there is one."""
    whole = np.zeros(len(at), dtype=np.int64)
    digits, decimals = np.zeros_like(whole), np.zeros_like(whole)
    behind_point = np.zeros(len(at), dtype=bool)
    going, at = np.ones(len(at), dtype=bool), at.copy()
    while going.any():
        byte = text.take(at, mode="clip")
        is_digit = going & (byte >= ord("0")) & (byte <= ord("9")) & (whole < _LARGE)
        is_point = going & (byte == ord(".")) & ~behind_point
        np.copyto(whole, whole * 10 + (byte - ord("0")), where=is_digit)
        digits += is_digit
        decimals += is_digit & behind_point
        behind_point |= is_point
        going = is_digit | is_point
        at += going
    return whole / 10.0**decimals, at, digits > 0


def _column(lines: Sequence[bytes], name: bytes) -> FloatArray:
    """The numbers of one field; ValueError where a line has none. A number that is none is a word:
    "NaN", "Infinity"."""
    mark = b'"%b": ' % name
    texts = [line.partition(mark)[2].partition(b",")[0] for line in lines]
    try:
        return np.array([float(text) for text in texts])
    except ValueError:
        return np.array([float(text.rstrip(b"}").strip(b'"')) for text in texts])


def _rows(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The rows of lines; ValueError for one that is no JSON object."""
    found = []
    for line in lines:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError
        found.append(parsed(row))
    return found


def _broken(path: Path, lines: Sequence[bytes]) -> UserError:
    """Names the first line that is no JSON object."""
    for number, line in enumerate(lines, start=1):
        try:
            _rows([line])
        except ValueError:
            return UserError(f"{path}: line {number} is no JSON object; delete it or rerun the run")
    raise AssertionError("a line was broken before")
