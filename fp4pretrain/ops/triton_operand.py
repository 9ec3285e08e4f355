"""What the Triton backend multiplies: operands as they lie in memory, and the GEMMs of two of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from fp4_kernels import cublaslt
from fp4_kernels.block_gemm import block_matmul
from fp4_kernels.quantize import Quantized
from fp4_kernels.spec import Copy
from fp4_kernels.unpack import unpack, unpack_e4m3
from torch import Tensor

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class TritonOperand:
    """One side of a GEMM [rows, k].

    ``data``: BF16 or FP8 values, or (``scales`` given) packed codes. The product is multiplied by
    ``alpha`` (fp32 scalar, None for 1) and its rows by ``factors`` (fp32 [rows], None for 1).
    ``blocks``: fp32 factors of FP8 values in blocks of 128, as ``cublaslt.block_layout`` lays them.
    ``lost``: given where packed codes go to FP8 tensor cores: int64, counts what E4M3 cannot hold.
    """

    data: Tensor
    shape: tuple[int, int]
    alpha: Tensor | None = None
    factors: Tensor | None = None
    scales: Tensor | None = None
    blocks: Tensor | None = None
    lost: Tensor | None = None
    swizzled: Tensor | None = None  # ``scales`` as the native backend's scaled_mm reads them

    def expanded(self) -> TritonOperand:
        """This operand with BF16 or FP8 values in place of packed codes."""
        if self.scales is None:
            return self
        if self.lost is None:
            return TritonOperand(unpack(self.data, self.scales), self.shape, self.alpha)
        values, factors = unpack_e4m3(self.data, self.scales, lost=self.lost)
        return TritonOperand(values, self.shape, self.alpha, factors)


def operand_of(
    q: Quantized, spec: QuantSpec, copy: Copy, *, lost: Tensor | None = None
) -> TritonOperand:
    """The operand that one copy is; ``lost`` as in ``TritonOperand``."""
    alpha = q.alpha
    if copy.scale == "unbiased" and spec.row.family == "mx":
        alpha = _four_thirds(q.out.device)
    if q.scales is None:
        return TritonOperand(q.out, q.shape, alpha)
    if copy.output == "codes" and spec.row.scale_type != "fp32":
        return TritonOperand(q.out, q.shape, alpha, scales=q.scales, lost=lost)
    if copy.block_length and copy.output == "codes":
        blocks = cublaslt.block_layout(q.scales, tiles=copy.block == "2d")
        return TritonOperand(q.out, q.shape, alpha, blocks=blocks)
    return TritonOperand(q.out, q.shape, alpha, q.scales.view(-1))


def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a * b, None standing for 1."""
    if a is None or b is None:
        return b if a is None else a
    return a * b


def target_of(
    a: TritonOperand, b: TritonOperand, out_dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """Where a GEMM of a and b writes: ``out`` itself where its epilogue can add there, or a matrix."""
    if out is not None and out.dtype == torch.float32 and out.stride(1) == 1:
        return out
    dtype = out_dtype if out_dtype == torch.bfloat16 and out is None else torch.float32
    return torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.data.device)


def finished(target: Tensor, out_dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The GEMM's result from what it wrote to ``target_of``."""
    if target is out:
        return target
    return target.to(out_dtype) if out is None else out.add_(target)


def multiply(
    a: TritonOperand,
    b: TritonOperand,
    *,
    out_dtype: torch.dtype,
    out: Tensor | None,
    fast_accum: bool,
    blocks_by_cublaslt: bool,
) -> Tensor:
    """a @ b.T as ``out_dtype``, or added in FP32 to ``out``, on BF16 or FP8 tensor cores.

    ``fast_accum``: let FP8 tensor cores hold the sums. ``blocks_by_cublaslt``: let cuBLASLt try operands
    in blocks of 128 before the Triton kernel.

    Raises:
        UserError: where cuBLASLt has no kernel for it.
    """
    if a.blocks is not None and b.blocks is not None:
        target = target_of(a, b, out_dtype, out)
        _multiply_blocks(a, b, target, add=target is out, by_cublaslt=blocks_by_cublaslt)
        return finished(target, out_dtype, out)
    a, b = a.expanded(), b.expanded()
    av, bv = a.data, b.data
    alpha = product(a.alpha, b.alpha)
    plain = alpha is None and a.factors is None and b.factors is None
    if plain and out is None and av.dtype == torch.bfloat16:
        if out_dtype == torch.float32:
            return torch.mm(av, bv.t(), out_dtype=torch.float32)
        return torch.mm(av, bv.t()).to(out_dtype)
    target = target_of(a, b, out_dtype, out)
    scales = None
    if a.factors is not None or b.factors is not None:
        scales = (_factors(a, alpha), _factors(b, None))
        alpha = None
    try:
        cublaslt.matmul(
            av,
            bv,
            target,
            alpha=alpha,
            accumulate=target is out,
            scales=scales,
            fast_accum=fast_accum and av.dtype in _FP8,
        )
    except cublaslt.CublasError as error:
        raise UserError(
            f"precision.backend: cuBLASLt cannot multiply {list(a.shape)} by {list(b.shape)} "
            f"({error}); use precision.backend=reference or sizes in multiples of 16"
        ) from None
    return finished(target, out_dtype, out)


def _multiply_blocks(
    a: TritonOperand, b: TritonOperand, target: Tensor, *, add: bool, by_cublaslt: bool
) -> None:
    """a @ b.T in blocks of 128, to or added to ``target``."""
    assert a.blocks is not None
    assert b.blocks is not None
    if by_cublaslt:
        try:
            cublaslt.matmul(a.data, b.data, target, accumulate=add, scales=(a.blocks, b.blocks))
            return
        except cublaslt.CublasError:
            pass  # a shape or pair of types it does not take: the Triton kernel takes all
    block_matmul((a.data, a.blocks), (b.data, b.blocks), target, accumulate=add)


@cache
def _four_thirds(device: torch.device) -> Tensor:
    return torch.tensor(4.0 / 3.0, dtype=torch.float32, device=device)


def _factors(operand: TritonOperand, alpha: Tensor | None) -> Tensor:
    """fp32 [rows]; ``alpha``, what remains of both operands, goes with the first one's."""
    factors = operand.factors
    if factors is None:
        factors = torch.ones(operand.shape[0], dtype=torch.float32, device=operand.data.device)
    return factors if alpha is None else factors * alpha
