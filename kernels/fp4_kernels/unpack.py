"""Packed FP4 back to a GEMM's operand: what the forward pass saved, expanded when the backward pass needs it.

A packed copy is a quarter of the bfloat16 bytes. Expanding it reads that quarter and writes the operand, so
keeping the packed form costs a little bandwidth and saves three quarters of the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import float_of, fp8_word, power_of_byte
from fp4_kernels.device import has_fast_casts
from fp4_kernels.e2m1 import FROM_SUBNORMAL
from fp4_kernels.elements import e4m3_factor, e4m3_unit, join_words, off_grid
from fp4_kernels.launch import launch

TILE = (16, 64, 4)  # rows and 8-code words of a program, and its warps
SIGN_BITS = tl.constexpr(-0x7F7F7F80)  # 0x80808080


@triton.jit
def _e4m3_value(byte):
    """fp32 of E4M3 bytes (int32) of block scales: no sign, NaN for 0x7F."""
    value = float_of(byte << 20) * (2.0**120)
    return tl.where(byte == 0x7F, float("nan"), value)


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
    inside = (m < R) & (w * 8 < C)
    word = tl.load(codes_ptr + m.to(tl.int64) * (C // 8) + w, mask=inside, other=0)
    place = (m // TALL).to(tl.int64) * (C // BLOCK) + w * 8 // BLOCK
    byte = tl.load(scales_ptr + place, mask=inside, other=0).to(tl.int32)
    scale = power_of_byte(byte) if E8M0 else _e4m3_value(byte)
    j = tl.arange(0, 8)[None, None, :]
    value = _elements(word[:, :, None] >> (j * 4)) * scale[:, :, None]
    n = tl.program_id(0) * (BW * 8) + tl.arange(0, BW * 8)[None, :]
    value = tl.reshape(value.to(tl.bfloat16), [BM, BW * 8])
    tl.store(out_ptr + m.to(tl.int64) * C + n, value, mask=(m < R) & (n < C))


@triton.jit
def _chosen(lo, hi, selector, FAST: tl.constexpr):
    """int32: four of the eight bytes in hi:lo (``prmt``). Nibble i of ``selector`` (0 to 7) says which."""
    if FAST:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [lo, hi, selector],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        both = (hi.to(tl.int64) << 32) | (lo.to(tl.int64) & 0xFFFFFFFF)
        word = tl.zeros_like(selector)
        for i in tl.static_range(4):
            place = ((selector >> (4 * i)) & 7) * 8
            word |= ((both >> place) & 0xFF).to(tl.int32) << (8 * i)
        return word


@triton.jit
def _e4m3_words(words, unit, FAST: tl.constexpr):
    """Words of eight codes of blocks as twice as many of E4M3; ``unit`` is what a block's 1.0 becomes.

    Each byte is one of the block's eight E4M3 magnitudes, chosen by its code, with the code's sign.
    """
    lo = fp8_word(unit * 0.0, unit * 0.5, unit, unit * 1.5, False, FAST)
    hi = fp8_word(unit * 2.0, unit * 3.0, unit * 4.0, unit * 6.0, False, FAST)
    zero = tl.zeros_like(lo)
    out = ()
    for i in tl.static_range(len(words)):
        magnitudes = words[i] & 0x77777777
        even, odd = (words[i] << 4) & SIGN_BITS, words[i] & SIGN_BITS  # of codes 0 2 4 6, 1 3 5 7
        first = _chosen(lo, hi, magnitudes, FAST) | _chosen(even, odd, zero + 0x5140, FAST)
        second = _chosen(lo, hi, magnitudes >> 16, FAST) | _chosen(even, odd, zero + 0x7362, FAST)
        out = out + (first, second)
    return out


@triton.jit
def unpack_e4m3_kernel(
    codes_ptr, scales_ptr, factors_ptr, lost_ptr, out_ptr, R, C,
    TALL: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """codes int64 words [R, C / 16] and E8M0 scales to E4M3 words [R, C / 4] and fp32 factors [R].

    A program takes BM whole rows, NB blocks of 32 at a time. lost: int64, to which the number of elements
    that E4M3 cannot hold is added.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    blocks = C // 32
    scales = scales_ptr + (m // TALL).to(tl.int64) * blocks
    top = tl.zeros([BM], tl.int32) + 6
    least = tl.zeros([BM], tl.int32) + 255
    for n0 in range(0, blocks, NB):
        n = n0 + tl.arange(0, NB)[None, :]
        inside = (m < R) & (n < blocks)
        byte = tl.load(scales + n, mask=inside, other=0).to(tl.int32)
        top = tl.maximum(top, tl.max(byte, axis=1))
        least = tl.minimum(least, tl.min(tl.where(inside, byte, 255), axis=1))
    far = tl.max(top - least, axis=0) > 14
    tl.store(factors_ptr + m, e4m3_factor(top)[:, None], mask=m < R)
    row = m.to(tl.int64)
    for n0 in range(0, blocks, NB):
        n = n0 + tl.arange(0, NB)[None, :]
        inside = (m < R) & (n < blocks)
        gap = top[:, None] - tl.load(scales + n, mask=inside, other=0).to(tl.int32)
        unit = e4m3_unit(gap)  # the row's largest block scale becomes 2^6
        words = ()
        for i in tl.static_range(2):
            pair = tl.load(codes_ptr + (row * blocks + n) * 2 + i, mask=inside, other=0)
            words = words + (pair.to(tl.int32), (pair >> 32).to(tl.int32))
        if far:
            lost = tl.zeros([BM, NB], tl.int32)
            for i in tl.static_range(4):
                for j in tl.static_range(8):
                    lost += off_grid(_elements(words[i] >> (4 * j)) * unit).to(tl.int32)
            tl.atomic_add(lost_ptr, tl.sum(tl.sum(lost, axis=1), axis=0).to(tl.int64))
        out = tl.reshape(join_words(_e4m3_words(words, unit, FAST)), [BM, NB * 8])
        w = n0 * 8 + tl.arange(0, NB * 8)[None, :]
        tl.store(out_ptr + row * (C // 4) + w, out, mask=(m < R) & (w < C // 4))


def unpack(codes: Tensor, scales: Tensor) -> Tensor:
    """Element x block scale, bfloat16 [R, C], of a packed copy: exact.

    Args:
        codes: uint8 [R, C / 2], contiguous.
        scales: float8_e4m3fn or float8_e8m0fnu [R or R / block, C / block], contiguous.
    """
    (rows, cols), block = _shape_and_block(codes, scales)
    out = torch.empty((rows, cols), dtype=torch.bfloat16, device=codes.device)
    bm, bw, warps = TILE
    launch(
        unpack_kernel, (-(-cols // (bw * 8)), -(-rows // bm)),
        ((codes, torch.int32), (scales, torch.uint8), out, rows, cols), (),
        (*block, scales.dtype == torch.float8_e8m0fnu, bm, bw), warps=warps,
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
    (rows, cols), block = _shape_and_block(codes, scales)
    factors = torch.empty(rows, dtype=torch.float32, device=codes.device)
    out = torch.empty((rows, cols), dtype=torch.float8_e4m3fn, device=codes.device)
    # A row a program, as much of it at a time as four warps take: the best of 23 on an H100. Triton's
    # interpreter pays by the operation, so there it takes many.
    fast = has_fast_casts(codes.device)
    bm, nb = 1 if fast else 32, min(256, max(64, triton.next_power_of_2(cols // block[0])))
    launch(
        unpack_e4m3_kernel, (-(-rows // bm), 1),
        ((codes, torch.int64), (scales, torch.uint8), factors, lost, (out, torch.int32), rows, cols),
        (), (block[1], bm, nb, fast), warps=nb // 64,
    )  # fmt: skip
    return out, factors


def _shape_and_block(codes: Tensor, scales: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a packed copy, and elements of a block along a row and rows of a tile."""
    rows, cols = codes.shape[0], codes.shape[1] * 2
    return (rows, cols), (cols // scales.shape[1], rows // scales.shape[0])
