"""When a rule holds: from or until a fraction of the run, a step or a number of tokens, or on a trigger.

A trigger is a condition on a quantity that the run measures, ``gap > 0.02 for 3``: it fires once the
condition was true in so many measurements one after the other.

    quantity            is                                                        measured
    loss_ratio          a step's loss over the mean of the 32 before              every step
    gap                 validation loss over the baseline's at these tokens, - 1  evaluations; baseline=FOLDER
    gradient_to_noise   |dW| / (sqrt(3) |N|), N the error that wgrad's casts add  observe.interval steps;
                        (arXiv:2505.19115: below 1, FP4 stops helping)            statistic gradient_noise
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fp4pretrain.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_GRAMMAR = "a fraction of the run (0 to 1), '500 steps' or '2B tokens'"


@dataclass(frozen=True)
class Progress:
    """How far a run is: finished steps of how many, tokens trained on, and the rules (by name) whose
    triggers have fired and were not released."""

    step: int = 0
    steps: int = 1
    tokens: int = 0
    fired: frozenset[str] = frozenset()

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


QUANTITIES = ("loss_ratio", "gap", "gradient_to_noise")


@dataclass(frozen=True)
class Trigger:
    """``quantity`` above or below ``value`` in ``count`` measurements, one after the other."""

    quantity: str
    above: bool
    value: float
    count: int = 1

    def holds(self, measured: float) -> bool:
        """Whether one measurement meets the condition; a NaN does not."""
        return measured > self.value if self.above else measured < self.value

    def __str__(self) -> str:
        times = f" for {self.count}" if self.count > 1 else ""
        return f"{self.quantity} {'>' if self.above else '<'} {self.value:.6g}{times}"


def parse_trigger(key: str, value: object) -> Trigger | None:
    """A trigger from YAML: null, or text such as ``gap > 0.02 for 3``.

    Raises:
        UserError: naming ``key``, for anything else.
    """
    if value is None:
        return None
    found = re.fullmatch(
        r"\s*(\w+)\s*([<>])\s*(-?[\d.]+(?:e-?\d+)?)\s*(?:for\s+(\d+))?\s*", str(value)
    )
    if found is None or (found[4] is not None and int(found[4]) < 1):
        raise UserError(
            f"{key}: {value!r} is no condition; write it as 'gap > 0.02', or 'gap > 0.02 for 3'"
        )
    if found[1] not in QUANTITIES:
        raise UserError(f"{key}: {found[1]} is not measured; use one of {', '.join(QUANTITIES)}")
    return Trigger(found[1], found[2] == ">", float(found[3]), int(found[4] or 1))
