"""The reference backend: plain torch, any device, the numbers every other backend is held to.

An operand is kept as element x block scale, which is exact in BF16 for nvfp4, mxfp4, mxfp8 and FP8
with one scale a tensor or row; scales that span the contraction axis multiply the result (alpha),
never an operand. On CUDA exact operands are multiplied in BF16 with FP32 accumulation; on a CPU in
FP32, which gives the same products and is faster there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.numerics import QuantSpec, emulate, rotate, spanning_amax
from fp4pretrain.ops.backend import ReduceAmax
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand, dequantized
from fp4pretrain.precision import Gemm, Recipe

if TYPE_CHECKING:
    from fp4pretrain.ops.handed import Awaited


@dataclass
class EmulatedOperand(Operand):
    """values [rows, k] (element x block scale) and alpha: fp32, a scalar or [rows, 1], None for 1."""

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "alpha")
    values: Tensor
    alpha: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        """fp32 [rows, k]; see ``Operand.dequantize``."""
        return dequantized(self.values, self.alpha)

    def transposed(self) -> Operand | None:
        """See ``Operand.transposed``: values alone, where one scalar is all that remains."""
        if self.alpha is not None and self.alpha.dim():
            return None
        return EmulatedOperand(self.values.t(), self.alpha)


class ReferenceBackend:
    """Plain PyTorch on any device."""

    name = "reference"

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None: it can run everything."""
        return None

    def why_not_cast(self, spec: QuantSpec, device: torch.device) -> str | None:
        """None: it makes every cast."""
        return None

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """What multiplies there: torch's matmul."""
        exact = all(spec.exact_in_bf16 for spec in gemm.specs)
        return "torch.mm, bf16" if exact and device.type == "cuda" else "torch matmul, fp32"

    def quantize(
        self,
        x: Tensor,
        casts: Sequence[Cast],
        reduce_amax: ReduceAmax | None = None,
        partners: Sequence[Operand | None] = (),
    ) -> list[Operand]:
        """One operand of x [rows, cols] for each cast; see ``Backend.quantize``."""
        turned = [oriented(x, cast) for cast in casts]
        amaxes = [spanning_amax(o, c.spec) for o, c in zip(turned, casts, strict=True)]
        if reduce_amax is not None:
            asking = [i for i, c in enumerate(casts) if c.asks and amaxes[i] is not None]
            for i, amax in zip(asking, reduce_amax([amaxes[i] for i in asking]), strict=True):
                amaxes[i] = amax
        return [emulated(o, cast, a) for o, cast, a in zip(turned, casts, amaxes, strict=True)]

    def awaits(self, casts: Sequence[Cast], device: torch.device) -> Awaited | None:
        """None: every cast measures for itself."""
        return None

    def gemm(
        self,
        a: EmulatedOperand,
        b: EmulatedOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
        fast_accum: bool = False,
    ) -> Tensor:
        """a @ b.T; see ``Backend.gemm``. Sums are FP32's whatever ``fast_accum`` allows."""
        out = _matmul_fp32(a.values, b.values)
        if a.alpha is not None:
            out *= a.alpha
        if b.alpha is not None:
            out *= b.alpha if b.alpha.dim() == 0 else b.alpha.t()
        if accumulate_into is not None:
            return accumulate_into.add_(out)
        return out.to(out_dtype)

    def counters(self, recipes: Sequence[Recipe], device: torch.device) -> dict[str, Tensor]:
        """Nothing: every operand is exact."""
        return {}


def emulated(x: Tensor, cast: Cast, amax: Tensor | None) -> EmulatedOperand:
    """The operand of an ``oriented`` x, by the amaxes that ``spanning_amax`` names."""
    if not cast.spec.quantized:
        return EmulatedOperand(x.bfloat16(), None)
    values, alpha = emulate(x, cast.spec, noise=cast.noise, amax=amax, group=cast.rotation_size)
    if cast.spec.exact_in_bf16 and x.is_cuda:
        values = values.bfloat16()
    return EmulatedOperand(values, alpha)


def oriented(x: Tensor, cast: Cast) -> Tensor:
    """x [rows, cols] or its transpose, padded and rotated along its last axis where the cast says so:
    what is rounded, and what an observer compares the operand with."""
    if cast.transpose:
        x = x.t()
    padding = cast.padding(x.shape[1])
    if padding:
        x = F.pad(x, (0, padding))
    if cast.rotation_size:
        signs = None
        if cast.signs is not None:
            signs = torch.tensor(cast.signs, dtype=torch.float32, device=x.device)
        return rotate(x, size=cast.rotation_size, signs=signs, round_bf16=not cast.rotated_fp32)
    # A transpose is copied once here, not in every pass that follows; BF16 makes no pass.
    return x.contiguous() if cast.spec.quantized else x


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in FP32: from BF16 operands with FP32 output on CUDA, in FP32 elsewhere."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()
