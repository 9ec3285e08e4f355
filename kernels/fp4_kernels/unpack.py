"""Packed FP4 back to a GEMM's operand: what was kept for the backward pass, as it is needed.

A packed copy is a quarter of the bfloat16 bytes. Expanding it reads that quarter and writes the operand, so
keeping the packed form costs a little bandwidth and saves three quarters of the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import bits_of, float_of, fp8_word, power_of_byte
from fp4_kernels.device import has_fast_casts
from fp4_kernels.e2m1 import FROM_SUBNORMAL
from fp4_kernels.elements import e4m3_factor, e4m3_unit, off_grid
from fp4_kernels.launch import launch

# Rows and 8-code words of a program's tile, and its warps.
TILE = (16, 64, 4)
ROWS = (8, 256, 4)  # rows and blocks of a program that looks for the largest scale of its rows


@triton.jit
def _e4m3_value(byte):
    """fp32 of E4M3 bytes (int32) of block scales: no sign, NaN for 0x7F."""
    value = float_of(byte << 20) * (2.0**120)
    return tl.where(byte == 0x7F, float("nan"), value)


@triton.jit
def _packed(codes_ptr, scales_ptr, R, C, BLOCK: tl.constexpr, TALL: tl.constexpr, m, w):
    """Words of eight codes at rows m and words w, and their blocks' scale bytes, int32."""
    inside = (m < R) & (w * 8 < C)
    word = tl.load(codes_ptr + m.to(tl.int64) * (C // 8) + w, mask=inside, other=0)
    place = (m // TALL).to(tl.int64) * (C // BLOCK) + w * 8 // BLOCK
    return word, tl.load(scales_ptr + place, mask=inside, other=0).to(tl.int32)


@triton.jit
def _elements(code):
    """fp32 of E2M1 codes in the lowest four bits."""
    return float_of(((code & 7) << 22) | ((code & 8) << 28)) * FROM_SUBNORMAL


@triton.jit
def unpack_kernel(
    codes_ptr, scales_ptr, out_ptr, R, C,
    BLOCK: tl.constexpr, TALL: tl.constexpr, E8M0: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """codes int32 words [R, C / 8], scales [R / TALL, C / BLOCK] to element x block scale [R, C]."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)[:, None]
    w = tl.program_id(0) * BW + tl.arange(0, BW)[None, :]
    word, byte = _packed(codes_ptr, scales_ptr, R, C, BLOCK, TALL, m, w)
    scale = power_of_byte(byte) if E8M0 else _e4m3_value(byte)
    j = tl.arange(0, 8)[None, None, :]
    value = _elements(word[:, :, None] >> (j * 4)) * scale[:, :, None]
    n = tl.program_id(0) * (BW * 8) + tl.arange(0, BW * 8)[None, :]
    value = tl.reshape(value.to(tl.bfloat16), [BM, BW * 8])
    tl.store(out_ptr + m.to(tl.int64) * C + n, value, mask=(m < R) & (n < C))


@triton.jit
def row_factors_kernel(
    scales_ptr, factors_ptr, R, BLOCKS, TALL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """fp32 factors [R] that ``elements.e4m3_frame`` gives rows, from their E8M0 bytes [R / TALL, BLOCKS]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    top = tl.zeros([BM], tl.int32)
    for n0 in range(0, BLOCKS, BN):
        n = n0 + tl.arange(0, BN)[None, :]
        place = (m[:, None] // TALL).to(tl.int64) * BLOCKS + n
        byte = tl.load(scales_ptr + place, mask=(m[:, None] < R) & (n < BLOCKS), other=0)
        top = tl.maximum(top, tl.max(byte.to(tl.int32), axis=1))
    tl.store(factors_ptr + m, e4m3_factor(tl.maximum(top, 6)), mask=m < R)


@triton.jit
def unpack_e4m3_kernel(
    codes_ptr, scales_ptr, factors_ptr, lost_ptr, out_ptr, R, C,
    BLOCK: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """codes and E8M0 scales to E4M3 words [R, C / 4] under ``row_factors_kernel``'s factors.

    lost: int64, to which the number of elements that E4M3 cannot hold is added.
    """
    m = tl.program_id(1) * BM + tl.arange(0, BM)[:, None]
    w = tl.program_id(0) * BW + tl.arange(0, BW)[None, :]
    word, byte = _packed(codes_ptr, scales_ptr, R, C, BLOCK, TALL, m, w)
    top = (bits_of(tl.load(factors_ptr + m, mask=m < R, other=0.0)) >> 23) + 6
    gap = top - byte  # the row's largest block scale becomes 2^6
    unit = e4m3_unit(gap)
    j = tl.arange(0, 8)[None, None, :]
    value = _elements(word[:, :, None] >> (j * 4)) * unit[:, :, None]
    if tl.max(tl.max(gap, axis=1), axis=0) > 14:
        lost = tl.sum(tl.reshape(off_grid(value), [BM * BW * 8]).to(tl.int32), axis=0)
        tl.atomic_add(lost_ptr, lost.to(tl.int64))
    even, odd = tl.split(tl.reshape(value, [BM, BW, 2, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    out = tl.reshape(fp8_word(first, second, third, fourth, False, FAST), [BM, BW * 2])
    n = tl.program_id(0) * (BW * 2) + tl.arange(0, BW * 2)[None, :]
    tl.store(out_ptr + m.to(tl.int64) * (C // 4) + n, out, mask=(m < R) & (n < C // 4))


def _grid(codes: Tensor, scales: Tensor) -> tuple[tuple[int, int], tuple[int, int], tuple]:
    """Shape [R, C] of a packed copy, the grid over it, and its block's constants."""
    rows, cols = codes.shape[0], codes.shape[1] * 2
    bm, bw, _ = TILE
    blocks = cols // scales.shape[1], rows // scales.shape[0]
    return (rows, cols), (-(-cols // (bw * 8)), -(-rows // bm)), blocks


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """Element x block scale, bfloat16 [R, C], of a packed copy: exact.

    Args:
        codes: uint8 [R, C / 2], contiguous.
        scales: float8_e4m3fn or float8_e8m0fnu [R or R / block, C / block], contiguous.
    """
    shape, grid, blocks = _grid(codes, scales)
    out = torch.empty(shape, dtype=torch.bfloat16, device=codes.device)
    launch(
        unpack_kernel, grid, ((codes, torch.int32), (scales, torch.uint8), out, *shape), (),
        (*blocks, scales.dtype == torch.float8_e8m0fnu, *TILE[:2]), warps=TILE[2],
    )  # fmt: skip
    return out


def unpack_e4m3(codes: Tensor, scales: Tensor, *, lost: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [R, C], fp32 factors [R]) of a packed mxfp4 copy, for FP8 tensor cores.

    Args:
        codes: uint8 [R, C / 2], contiguous.
        scales: float8_e8m0fnu [R or R / block, C / block], contiguous.
        lost: int64 scalar, to which the number of elements more than E4M3 holds is added: those of
            blocks more than 2^14 under the largest of their row.
    """
    shape, grid, blocks = _grid(codes, scales)
    factors = torch.empty(shape[0], dtype=torch.float32, device=codes.device)
    launch(
        row_factors_kernel, (-(-shape[0] // ROWS[0]), 1),
        ((scales, torch.uint8), factors, shape[0], scales.shape[1]), (),
        (blocks[1], *ROWS[:2]), warps=ROWS[2],
    )  # fmt: skip
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=codes.device)
    launch(
        unpack_e4m3_kernel, grid,
        ((codes, torch.int32), (scales, torch.uint8), factors, lost, (out, torch.int32), *shape), (),
        (*blocks, *TILE[:2], has_fast_casts(codes.device)), warps=TILE[2],
    )  # fmt: skip
    return out, factors
