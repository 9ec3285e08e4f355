"""The rows of a metrics file, as many as a page needs: a run of millions of rows is read in seconds.

Of training rows, the mass of a file, only tokens and loss are read, by their names in the line; some of
them, and every other line, are parsed as JSON. Where there are more than ``POINTS`` training rows,
neighbouring ones are averaged, so that a point stands for the mean of the losses around it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

import numpy as np

from fp4pretrain.errors import UserError
from fp4pretrain.observe.jsonl import parsed

POINTS = 4000
_SAMPLES = 1000  # training rows that are read whole, in a file that has more than POINTS
_TRAIN = b'{"event": "train", '
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


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
    lines = path.read_bytes().split(b"\n")[:-1]
    of_training = [line.startswith(_TRAIN) and line.endswith(b"}") for line in lines]
    train = list(compress(lines, of_training))
    rest = list(compress(lines, map(not_, of_training)))
    try:
        columns = _columns(train)
    except ValueError:  # a training row without them
        train, rest, columns = [], lines, (np.zeros(0),) * 3
    every = 1 if len(train) <= POINTS else -(-len(train) // _SAMPLES)
    chosen = [*range(every - 1, len(train), every)]
    if train and chosen[-1] != len(train) - 1:
        chosen.append(len(train) - 1)
    try:
        others = _rows(rest)
        samples = _rows([train[index] for index in chosen])
    except ValueError:
        raise _broken(path, lines) from None
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


def _columns(lines: Sequence[bytes]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Steps, tokens and losses. A run writes them first and in this order, which is faster to read."""
    collecting = gc.isenabled()
    gc.disable()  # a list a line: the collector would look through all of them again and again
    try:
        fields = [line.split(b", ", 4) for line in lines]
        # behind "step": , "tokens": and "loss":
        steps = np.array([float(field[1][8:]) for field in fields])
        tokens = np.array([float(field[2][10:]) for field in fields])
        losses = np.array([float(field[3][8:]) for field in fields])
    except (ValueError, IndexError):
        return _column(lines, b"step"), _column(lines, b"tokens"), _column(lines, b"loss")
    finally:
        if collecting:
            gc.enable()
    return steps, tokens, losses


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
