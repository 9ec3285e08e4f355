"""Packed FP4 back to a GEMM's operand: what was kept for the backward pass, as it is needed.

A packed copy is a quarter of the bfloat16 bytes. Expanding it reads that quarter and writes the operand, so
keeping the packed form costs a little bandwidth and saves three quarters of the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import float_of, power_of_byte, round_fp8
from fp4_kernels.device import has_fast_casts
from fp4_kernels.e2m1 import FROM_SUBNORMAL
from fp4_kernels.launch import launch

# Rows and 8-code words of a program's tile, and its warps.
TILE = (16, 64, 4)


@triton.jit
def _e4m3_value(byte):
    """fp32 of E4M3 bytes (int32) of block scales: no sign, NaN for 0x7F."""
    value = float_of(byte << 20) * (2.0**120)
    return tl.where(byte == 0x7F, float("nan"), value)


@triton.jit
def unpack_kernel(
    codes_ptr, scales_ptr, factors_ptr, out_ptr, R, C,
    BLOCK: tl.constexpr, TALL: tl.constexpr, E8M0: tl.constexpr, TO_E4M3: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """codes int32 words [R, C / 8], scales [R / TALL, C / BLOCK] to element x block scale [R, C].

    TO_E4M3: bytes of E4M3, divided by their row's factor (a power of two).
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)[:, None]
    w = tl.program_id(0) * BW + tl.arange(0, BW)[None, :]
    inside = (m < R) & (w * 8 < C)
    word = tl.load(codes_ptr + m.to(tl.int64) * (C // 8) + w, mask=inside, other=0)
    place = (m // TALL).to(tl.int64) * (C // BLOCK) + w * 8 // BLOCK
    byte = tl.load(scales_ptr + place, mask=inside, other=0).to(tl.int32)
    scale = power_of_byte(byte) if E8M0 else _e4m3_value(byte)
    if TO_E4M3:
        factor = tl.load(factors_ptr + m, mask=m < R, other=1.0)
        scale = scale * tl.div_rn(tl.zeros_like(factor) + 1.0, factor)
    j = tl.arange(0, 8)[None, None, :]
    code = word[:, :, None] >> (j * 4)
    z = ((code & 7) << 22) | ((code & 8) << 28)
    value = float_of(z) * FROM_SUBNORMAL * scale[:, :, None]
    if TO_E4M3:
        value, _ = round_fp8(value, False, FAST)
        value = value.to(tl.uint8)
    else:
        value = value.to(tl.bfloat16)
    n = tl.program_id(0) * (BW * 8) + tl.arange(0, BW * 8)[None, :]
    value = tl.reshape(value, [BM, BW * 8])
    tl.store(out_ptr + m.to(tl.int64) * C + n, value, mask=(m < R) & (n < C))


def unpack(
    codes: Tensor,
    scales: Tensor,
    *,
    factors: Tensor | None = None,
    tile: tuple[int, int, int] = TILE,
) -> Tensor:
    """Element x block scale [R, C] of a packed copy, exact in bfloat16.

    Args:
        codes: uint8 [R, C / 2], contiguous.
        scales: float8_e4m3fn or float8_e8m0fnu [R or R / block, C / block], contiguous.
        factors: fp32 [R] powers of two: the result is float8_e4m3fn divided by them (mxfp4 only).
    """
    rows, cols = codes.shape[0], codes.shape[1] * 2
    bm, bw, warps = tile
    out = torch.empty(
        (rows, cols),
        dtype=torch.bfloat16 if factors is None else torch.float8_e4m3fn,
        device=codes.device,
    )
    arguments = (
        (codes, torch.int32), (scales, torch.uint8), factors,
        out if factors is None else (out, torch.uint8), rows, cols,
    )  # fmt: skip
    constants = (
        cols // scales.shape[1], rows // scales.shape[0], scales.dtype == torch.float8_e8m0fnu,
        factors is not None, bm, bw, has_fast_casts(codes.device),
    )  # fmt: skip
    grid = (-(-cols // (bw * 8)), -(-rows // bm))
    launch(unpack_kernel, grid, arguments, (), constants, warps=warps)
    return out
