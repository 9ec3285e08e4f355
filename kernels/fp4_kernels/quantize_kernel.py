"""The quantization kernel: up to one row copy and one column copy of a matrix, from one read of it.

A program owns TB * 16 tokens by BN columns and makes whichever copies are asked for. The column copy
loads the tile as sixteen tensors [TB, BN] (``rotation.py`` says why); the row copy then finds it in the
cache.
"""

import triton
import triton.language as tl

from fp4_kernels.column_copy import column_copy
from fp4_kernels.copies import store_alpha
from fp4_kernels.row_copy import row_copy

_SCALARS = tuple(
    f"{side}_{name}"
    for side in ("row", "col")
    for name in (
        "key", "signs_lo", "signs_hi", "row_offset", "row_part", "row_gap",
        "call_offset", "call_part", "call_gap",
    )
)  # fmt: skip


@triton.jit
def load_tile(x_ptr, stride, m0, n0, R, C, TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):
    """Sixteen tensors [TB, BN]: tensor i has the tokens m0 + tb * 16 + i; zeros outside the matrix."""
    n = n0 + tl.arange(0, BN)[None, :]
    xs = ()
    for i in tl.static_range(16):
        m = m0 + tl.arange(0, TB)[:, None] * 16 + i
        offset = m.to(tl.int64) * stride + n
        if EVEN:
            xs = xs + (tl.load(x_ptr + offset),)
        else:
            xs = xs + (tl.load(x_ptr + offset, mask=(m < R) & (n < C), other=0.0),)
    return xs


@triton.jit
def drawn(draw_ptr, key, signs_lo, signs_hi):
    """Key and sign words: what stands at ``draw_ptr``, or the arguments where there is none."""
    if draw_ptr is None:
        return key, signs_lo, signs_hi
    else:
        return tl.load(draw_ptr), tl.load(draw_ptr + 1), tl.load(draw_ptr + 2)


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_SCALARS)
def quantize_kernel(
    x_ptr, stride, R, C,
    row_out, row_scales, row_amax, row_alpha, row_partner, row_lost, row_draw,
    col_out, col_scales, col_amax, col_alpha, col_partner, col_lost, col_draw,
    row_key: tl.int64, row_signs_lo: tl.int64, row_signs_hi: tl.int64,
    row_row_offset: tl.int32, row_row_part: tl.int32, row_row_gap: tl.int32,
    row_call_offset: tl.int32, row_call_part: tl.int32, row_call_gap: tl.int32,
    col_key: tl.int64, col_signs_lo: tl.int64, col_signs_hi: tl.int64,
    col_row_offset: tl.int32, col_row_part: tl.int32, col_row_gap: tl.int32,
    col_call_offset: tl.int32, col_call_part: tl.int32, col_call_gap: tl.int32,
    ROW: tl.constexpr, COL: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """x [R, C] to a row copy (ROW: its config or None) and a column copy (COL).

    ``row_draw``, ``col_draw``: where key, signs_lo and signs_hi stand, if not in the arguments.
    ``row_partner``, ``col_partner``: alpha of the operand that the copy will be multiplied with, or None.
    """
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    geo = (m0, n0, R, C)
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    if COL is not None:
        col_key, col_signs_lo, col_signs_hi = drawn(col_draw, col_key, col_signs_lo, col_signs_hi)
        noise = (
            col_key, col_row_offset, col_row_part, col_row_gap,
            col_call_offset, col_call_part, col_call_gap,
        )  # fmt: skip
        ptr = (col_out, col_scales, col_amax, col_lost)
        xs = load_tile(x_ptr, stride, m0, n0, R, C, TB, BN, EVEN)
        column_copy(xs, geo, ptr, noise, (col_signs_lo, col_signs_hi), COL, EVEN, FAST)
        if first:
            store_alpha(col_alpha, col_amax, col_partner, COL)
    if ROW is not None:
        row_key, row_signs_lo, row_signs_hi = drawn(row_draw, row_key, row_signs_lo, row_signs_hi)
        noise = (
            row_key, row_row_offset, row_row_part, row_row_gap,
            row_call_offset, row_call_part, row_call_gap,
        )  # fmt: skip
        ptr = (row_out, row_scales, row_amax, row_lost)
        row_copy(
            x_ptr, stride, geo, ptr, noise, (row_signs_lo, row_signs_hi),
            TB * 16, BN, COL is not None, ROW, EVEN, FAST,
        )  # fmt: skip
        if first:
            store_alpha(row_alpha, row_amax, row_partner, ROW)
