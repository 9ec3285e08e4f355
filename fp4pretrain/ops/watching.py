"""The seam for observers: whoever is attached here is shown every cast of a GEMM's operand.

Nobody is attached in an ordinary step, and a cast then costs one comparison with None. A watch must
change nothing: it gets the tensors themselves. ``nn`` and ``ops`` know no observer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand


@dataclass(frozen=True)
class Seen:
    """One call of ``cast_operands``: who casts (``ops.backend.Caster``), x [rows, cols] in memory, its
    casts, and the operand of each."""

    caster: Any
    x: Tensor
    casts: Sequence[Cast]
    operands: Sequence[Operand]


Watch = Callable[[Seen], None]
attached: Watch | None = None


def attach(watch: Watch) -> None:
    """Show every cast from now on to ``watch``. Raises RuntimeError where another one is attached."""
    global attached
    if attached is not None:
        raise RuntimeError("another watch is attached: detach it first")
    attached = watch


def detach() -> None:
    """Show casts to nobody."""
    global attached
    attached = None
