"""The reference backend: plain torch, any device, the numbers every other backend is held to.

An operand is kept as element x block scale, which is exact in BF16 for nvfp4, mxfp4, mxfp8 and
per-tensor FP8; the tensor scales multiply the result (alpha), never an operand. On CUDA exact
operands are multiplied in BF16 with FP32 accumulation; on a CPU in FP32, which gives the same
products and is faster there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp4pretrain.numerics import emulate, rotate, tensor_amax
from fp4pretrain.ops.backend import Cast, ReduceAmax
from fp4pretrain.precision import OPERANDS, Gemm, Recipe


@dataclass
class EmulatedOperand:
    """values [rows, k] (element x block scale) and alpha, an fp32 scalar or None for 1."""

    values: torch.Tensor
    alpha: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]


class ReferenceBackend:
    """Plain PyTorch on any device."""

    name = "reference"

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        return None

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """What multiplies there: torch's matmul."""
        exact = all(getattr(gemm, o).exact_in_bf16 for o in OPERANDS[type(gemm).__name__.lower()])
        return "torch.mm, bf16" if exact and device.type == "cuda" else "torch matmul, fp32"

    def quantize(
        self, x: torch.Tensor, casts: Sequence[Cast], reduce_amax: ReduceAmax | None = None
    ) -> list[EmulatedOperand]:
        oriented = [_oriented(x, cast) for cast in casts]
        amax = [
            tensor_amax(o) if c.spec.needs_tensor_amax else None
            for o, c in zip(oriented, casts, strict=True)
        ]
        found = [a for a in amax if a is not None]
        if reduce_amax is not None and found:
            reduced = iter(reduce_amax(torch.stack(found)))
            amax = [None if a is None else next(reduced) for a in amax]
        return [_emulated(o, cast, a) for o, cast, a in zip(oriented, casts, amax, strict=True)]

    def gemm(
        self,
        a: EmulatedOperand,
        b: EmulatedOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: torch.Tensor | None = None,
        fast_accum: bool = False,
    ) -> torch.Tensor:
        """a @ b.T; see ``Backend.gemm``. Sums are FP32's whatever ``fast_accum`` allows."""
        out = _matmul_fp32(a.values, b.values)
        for alpha in (a.alpha, b.alpha):
            if alpha is not None:
                out *= alpha
        if accumulate_into is not None:
            return accumulate_into.add_(out)
        return out.to(out_dtype)

    def counters(self, recipe: Recipe, device: torch.device) -> dict[str, int]:
        """Nothing: every operand is exact."""
        return {}


def _emulated(x: torch.Tensor, cast: Cast, amax: torch.Tensor | None) -> EmulatedOperand:
    if not cast.spec.quantized:
        return EmulatedOperand(x.bfloat16(), None)
    values, alpha = emulate(x, cast.spec, noise=cast.noise, amax=amax)
    if cast.spec.exact_in_bf16 and x.is_cuda:
        values = values.bfloat16()
    return EmulatedOperand(values, alpha)


def _oriented(x: torch.Tensor, cast: Cast) -> torch.Tensor:
    """x [rows, cols] or its transpose, rotated along its last axis where the cast says so."""
    if cast.transpose:
        x = x.t()
    if cast.rotation_size:
        signs = None
        if cast.signs is not None:
            signs = torch.tensor(cast.signs, dtype=torch.float32, device=x.device)
        return rotate(x, size=cast.rotation_size, signs=signs)
    # A transpose is copied once here, not in every pass that follows; BF16 makes no pass.
    return x.contiguous() if cast.spec.quantized else x


def _matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T in FP32: from BF16 operands with FP32 output on CUDA, in FP32 elsewhere."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()
