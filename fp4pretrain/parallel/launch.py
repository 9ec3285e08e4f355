"""What a launcher says to its processes, in torchrun's variables. No torch here: every verb asks for a rank.

Either RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all there and fit each other, or none of the
first two is and the process is alone. A part of them (WORLD_SIZE=4 left over from a batch script) would
make a process claim ranks that nobody is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fp4pretrain.errors import UserError

_CURE = "unset RANK and WORLD_SIZE to train in one process, or start with torchrun"


@dataclass(frozen=True)
class Launch:
    """This process's rank among ``size``, and its number on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """The launch this process is part of; alone where no launcher's variable says otherwise.

    Raises UserError for variables that form no launch.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None:
        if size is not None and size != 1:
            raise UserError(f"WORLD_SIZE: {size} is set without RANK; {_CURE}")
        return Launch()
    if size is None:
        raise UserError(f"RANK: {rank} is set without WORLD_SIZE; {_CURE}")
    if not 0 <= rank < size:
        raise UserError(f"RANK: {rank} is no rank of WORLD_SIZE={size}; {_CURE}")
    return Launch(rank, size, _number("LOCAL_RANK") or 0)


def check_address() -> None:
    """Raises UserError where the ranks of a launch are not told where to meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name}: not set, where RANK and WORLD_SIZE are; {_CURE}")
    _number("MASTER_PORT")


def is_main() -> bool:
    """Whether this process speaks for all: rank 0, alone, or in no launch that can be understood."""
    try:
        return launched().rank == 0
    except UserError:
        return True


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}: {text!r} is no whole number; {_CURE}") from None
