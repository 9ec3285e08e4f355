"""What the Triton backend multiplies: operands as they lie in memory, and the GEMMs of two of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from fp4_kernels import cublaslt
from fp4_kernels.block_gemm import block_matmul
from fp4_kernels.quantize import Quantized
from fp4_kernels.spec import Copy
from fp4_kernels.unpack import unpack, unpack_e4m3
from torch import Tensor

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops.operand import Operand, dequantized

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What cuBLASLt needs of rows and columns in FP8, and of some BF16 shapes.
_ALIGNED = 16


@dataclass
class TritonOperand(Operand):
    """One side of a GEMM [rows, k].

    ``data``: BF16 or FP8 values, or (``scales`` given) packed codes. The product is multiplied by
    ``alpha`` (fp32 scalar, None for 1) and its rows by ``factors`` (fp32 [rows], None for 1).
    ``blocks``: fp32 factors of FP8 values in blocks of 128, as ``cublaslt.block_layout`` lays them.
    ``lost``: given where packed codes go to FP8 tensor cores: int64, counts what E4M3 cannot hold, once.
    ``native``: tensor cores multiply the codes, so nobody expands them.
    ``paired``: (alpha of the operand that this one will meet, the product of both alphas), or None.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("data", "alpha", "factors", "scales", "blocks")
    data: Tensor
    shape: tuple[int, int]
    alpha: Tensor | None = None
    factors: Tensor | None = None
    scales: Tensor | None = None
    blocks: Tensor | None = None
    lost: Tensor | None = None
    swizzled: Tensor | None = None  # ``scales`` as the native backend's scaled_mm reads them
    paired: tuple[Tensor, Tensor] | None = None
    native: bool = False

    def expanded(self) -> TritonOperand:
        """This operand with BF16 or FP8 values in place of packed codes."""
        if self.scales is None:
            return self
        if self.lost is None:
            values = unpack(self.data, self.scales)
            return TritonOperand(values, self.shape, self.alpha, paired=self.paired)
        values, factors = unpack_e4m3(self.data, self.scales, lost=self.lost)
        self.lost = _uncounted(self.data.device)  # a weight's codes are expanded for each GEMM
        return TritonOperand(values, self.shape, self.alpha, factors)

    def dequantize(self) -> Tensor:
        """fp32 [rows, k]; see ``Operand.dequantize``."""
        if self.scales is not None and self.lost is not None:  # not counted: nothing is multiplied
            return replace(self, lost=_uncounted(self.data.device)).expanded().dequantize()
        a = self.expanded()
        values = a.data.to(torch.float32)
        if a.blocks is not None:
            tall = 1 if a.blocks.shape[0] == a.shape[0] else 128
            factors = a.blocks.repeat_interleave(tall, 0)[: a.shape[0]]
            values = values * factors.repeat_interleave(128, 1)
        return dequantized(values, a.factors, a.alpha)

    def transposed(self) -> Operand | None:
        """BF16 values under at most one scalar, expanded if they are packed: cuBLASLt reads a BF16 matrix
        either way. FP8 codes under one scalar, copied: it reads those with k adjacent."""
        scaled = self.lost is not None or self.factors is not None or self.blocks is not None
        if scaled or (self.native and self.scales is not None):
            return None
        data = self.expanded().data.t()
        if data.dtype in _FP8:
            data = data.view(torch.uint8).contiguous().view(data.dtype)
        return TritonOperand(data, (self.shape[1], self.shape[0]), self.alpha)


def operand_of(
    q: Quantized,
    spec: QuantSpec,
    copy: Copy,
    *,
    lost: Tensor | None = None,
    partner: Tensor | None = None,
    native: bool = False,
) -> TritonOperand:
    """The operand that one copy is. ``lost`` and ``native`` as in ``TritonOperand``; ``partner``: the alpha
    that it met."""
    alpha = q.alpha
    paired = None if partner is None or q.paired is None else (partner, q.paired)
    if copy.scale == "unbiased" and spec.row.family == "mx":
        alpha = _four_thirds(q.out.device)
    if q.scales is None:
        return TritonOperand(q.out, q.shape, alpha, paired=paired)
    if copy.output == "codes" and spec.row.scale_type != "fp32":
        return TritonOperand(
            q.out, q.shape, alpha, scales=q.scales, lost=lost, paired=paired, native=native
        )
    if copy.block_length and copy.output == "codes":
        blocks = cublaslt.block_layout(q.scales, tiles=copy.block == "2d")
        return TritonOperand(q.out, q.shape, alpha, blocks=blocks)
    return TritonOperand(q.out, q.shape, alpha, q.scales.view(-1))


def product(a: TritonOperand, b: TritonOperand) -> Tensor | None:
    """a.alpha * b.alpha, None standing for 1; made by the kernel that cast one of them where it knew the
    other."""
    if a.alpha is None or b.alpha is None:
        return b.alpha if a.alpha is None else a.alpha
    for one, other in ((a, b), (b, a)):
        if one.paired is not None and one.paired[0] is other.alpha:
            return one.paired[1]
    return a.alpha * b.alpha


def target_of(
    a: TritonOperand, b: TritonOperand, out_dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """The matrix that a GEMM of a and b writes: ``out`` where the GEMM can add to it, or a new one."""
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
    rows, cols, k = a.shape[0], b.shape[0], a.shape[1]
    if not rows or not cols or not k:
        if out is not None:
            return out
        return torch.zeros((rows, cols), dtype=out_dtype, device=a.data.device)
    if a.blocks is not None and b.blocks is not None:
        target = target_of(a, b, out_dtype, out)
        _multiply_blocks(a, b, target, add=target is out, by_cublaslt=blocks_by_cublaslt)
        return finished(target, out_dtype, out)
    a, b = a.expanded(), b.expanded()
    av, bv = a.data, b.data
    scalars = (a.alpha, b.alpha, a.factors, b.factors)
    if all(s is None for s in scalars) and out is None and av.dtype == torch.bfloat16:
        if out_dtype == torch.float32:
            return torch.mm(av, bv.t(), out_dtype=torch.float32)
        return torch.mm(av, bv.t()).to(out_dtype)
    if (rows % _ALIGNED or cols % _ALIGNED or k % _ALIGNED) and _needs_alignment(av):
        padded = _multiply_aligned(_aligned(a), _aligned(b), None, torch.float32, fast_accum)
        result = padded[:rows, :cols]
        return result.to(out_dtype) if out is None else out.add_(result)
    return _multiply_aligned(a, b, out, out_dtype, fast_accum)


def _multiply_aligned(
    a: TritonOperand, b: TritonOperand, out: Tensor | None, out_dtype: torch.dtype, fast: bool
) -> Tensor:
    """The product of expanded operands by cuBLASLt."""
    alpha, scales = product(a, b), None
    target = target_of(a, b, out_dtype, out)
    if a.factors is not None or b.factors is not None:
        scales = (_factors(a, alpha), _factors(b, None))
        alpha = None
    try:
        cublaslt.matmul(
            a.data,
            b.data,
            target,
            alpha=alpha,
            accumulate=target is out,
            scales=scales,
            fast_accum=fast and a.data.dtype in _FP8,
        )
    except cublaslt.CublasError as error:
        raise UserError(
            f"precision.backend: cuBLASLt cannot multiply {list(a.shape)} by {list(b.shape)} "
            f"({error}); use precision.backend=reference"
        ) from None
    return finished(target, out_dtype, out)


def _needs_alignment(values: Tensor) -> bool:
    """FP8 always; BF16 of odd sizes is padded too, so that every layout of them has a kernel."""
    return values.is_cuda or values.dtype in _FP8


def _aligned(a: TritonOperand) -> TritonOperand:
    """The operand with zeros appended to rows and columns up to what cuBLASLt needs."""
    more = (0, -a.shape[1] % _ALIGNED, 0, -a.shape[0] % _ALIGNED)
    data = a.data
    if any(more):
        bits = data.view(torch.uint8) if data.dtype in _FP8 else data
        data = F.pad(bits, more).view(data.dtype)
    factors = None if a.factors is None else F.pad(a.factors, (0, more[3]))
    return TritonOperand(data.contiguous(), (data.shape[0], data.shape[1]), a.alpha, factors)


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
def _uncounted(device: torch.device) -> Tensor:
    """Where counts go that nobody reads."""
    return torch.zeros((), dtype=torch.int64, device=device)


@cache
def _four_thirds(device: torch.device) -> Tensor:
    return torch.tensor(4.0 / 3.0, dtype=torch.float32, device=device)


def _factors(operand: TritonOperand, alpha: Tensor | None) -> Tensor:
    """fp32 [rows]; ``alpha``, what remains of both operands, goes with the first one's."""
    factors = operand.factors
    if factors is None:
        factors = torch.ones(operand.shape[0], dtype=torch.float32, device=operand.data.device)
    return factors if alpha is None else factors * alpha
