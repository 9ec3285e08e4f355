"""One side of a GEMM, as a backend made it from a tensor: saved by autograd, measured, dequantized."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class Operand:
    """One side of a GEMM, [rows, k] with the contraction axis last, in the form of its backend.

    Subclasses are dataclasses whose tensor fields are named in ``TENSORS``. ``shape`` counts the
    zeros that pad the contraction axis.
    """

    TENSORS: ClassVar[tuple[str, ...]]
    shape: tuple[int, int]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the operand is made of, for ``save_for_backward``; None where a part is absent."""
        held = self.__dict__
        return tuple([held[name] for name in self.TENSORS])

    def hollow(self) -> Operand:
        """The operand without its tensors: what stays on autograd's context."""
        return self.filled((None,) * len(self.TENSORS))

    def filled(self, tensors: tuple[Tensor | None, ...]) -> Operand:
        """A hollow operand with the tensors that ``tensors()`` gave, in their order."""
        operand = object.__new__(type(self))
        operand.__dict__.update(self.__dict__)
        operand.__dict__.update(zip(self.TENSORS, tensors, strict=True))
        return operand

    @property
    def nbytes(self) -> int:
        """Bytes the tensors occupy."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

    def dequantize(self) -> Tensor:
        """fp32 [rows, k]: what the GEMM multiplies, all scales included, rotated where the cast is."""
        raise AssertionError("every backend's operand says it")

    def transposed(self) -> Operand | None:
        """The operand of the transposed matrix, from the same memory; None where its form has none."""
        return None


def dequantized(values: Tensor, *factors: Tensor | None) -> Tensor:
    """fp32 values times factors (scalars, [rows] or [rows, 1]); None stands for 1."""
    out = values.to(torch.float32)
    for factor in factors:
        if factor is not None:
            out = out * (factor if factor.dim() == 0 else factor.reshape(-1, 1))
    return out
