"""Numbers as people write them: "2M" tokens; a warmup as steps, tokens or a fraction of the run; "2h"."""

from __future__ import annotations

import re
from typing import Any

from fp4pretrain.errors import UserError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def tokens_of(value: Any, *, key: str) -> int:
    """A number of tokens: 2000000, "2M", "1.5B" (K, M, B, T). Raises UserError naming ``key``."""
    found = _amount(value)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if found is None and (plain or re.fullmatch(r"\d+", str(value))):
        found = float(value)
    if found is None or not 1 <= found < 2**62:
        raise UserError(f"{key}: {value!r} is no number of tokens; write 2000000, 2M or 1.5B")
    return round(found)


def steps_of(value: Any, *, steps: int, tokens_a_step: int, key: str) -> int:
    """A part of a run in whole steps.

    Args:
        value: a number below 1 is a fraction of the run, one from 1 on so many steps, and one with a
            suffix ("2M") so many tokens, rounded to the nearest step.
        steps: of the run.
        tokens_a_step: of all ranks.
        key: for the message of the UserError that anything else raises.
    """
    amount = _amount(value)
    if amount is not None:
        return round(amount / tokens_a_step)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value < 1:
        return round(value * steps)
    if number and 1 <= value < 2**31 and value == int(value):
        return int(value)
    raise UserError(
        f"{key}: {value!r} is neither a fraction of the run (0.1), nor steps (200), nor tokens (2M); "
        "give one of them"
    )


def seconds_of(value: Any, *, key: str) -> float:
    """A time with its unit: "90s", "30m", "1.5h", "2d". Raises UserError naming ``key``."""
    read = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value) if isinstance(value, str) else None
    if read is None or float(read[1]) == 0:
        raise UserError(f"{key}: {value!r} is no time; write 90s, 30m, 2h or 1d")
    return float(read[1]) * _SECONDS[read[2]]


def _amount(value: Any) -> float | None:
    """The number that "1.5M" stands for; None for what has no suffix."""
    read = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT])", value) if isinstance(value, str) else None
    return float(read[1]) * _SUFFIXES[read[2]] if read else None
