"""Moments of a run at which a rule begins or ends: a fraction of the run, a step, or a number of tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fp4pretrain.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_GRAMMAR = "a fraction of the run (0 to 1), '500 steps' or '2B tokens'"


@dataclass(frozen=True)
class Progress:
    """How far a run is: finished steps of how many, and tokens trained on."""

    step: int = 0
    steps: int = 1
    tokens: int = 0

    @property
    def fraction(self) -> float:
        """0 before the first step, 1 after the last."""
        return self.step / self.steps


@dataclass(frozen=True)
class Point:
    """One moment: ``value`` in ``unit`` fraction, steps or tokens. It is reached by a step's start."""

    unit: str
    value: float

    def reached(self, progress: Progress) -> bool:
        """Whether the next step begins at this moment or after it."""
        now = {"fraction": progress.fraction, "steps": progress.step, "tokens": progress.tokens}
        return now[self.unit] >= self.value

    def __str__(self) -> str:
        if self.unit == "fraction":
            return f"{self.value:.4g} of the run"
        return f"{self.value:.10g} {self.unit}"


def parse_point(key: str, value: object) -> Point | None:
    """A moment from YAML: null, a number from 0 to 1, ``500 steps`` or ``2B tokens``.

    Raises:
        UserError: naming ``key``, for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMBT]?)\s*(steps|tokens)?\s*", value)
        if found is None:
            raise UserError(f"{key}: {value!r} is no moment; give {_GRAMMAR}")
        number = float(found[1]) * _UNITS[found[2]]
        if found[3]:
            return Point(found[3], number)
        value = number
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{key}: {value} is no fraction of the run; give {_GRAMMAR}")
    return Point("fraction", float(value))
