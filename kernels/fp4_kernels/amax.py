"""The largest magnitude of a matrix and of its rotated transpose, in one pass at copy speed.

Magnitudes are compared as integers, where NaN is above Inf and Inf above every number, so the result does
not depend on the order of the programs. Scaling and rounding to bfloat16 keep the order of magnitudes, so
a rotated copy's amax is found before them, and they are applied to this one number.

The programs of a launch raise their maxima in a small workspace. The last program to end copies the
maxima to the output and clears the workspace, so no second kernel and no memset is needed. Each stream
has a workspace of its own, because its launches follow one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import bits_of, float_of, max_nan, widen
from fp4_kernels.device import has_fast_casts
from fp4_kernels.launch import launch
from fp4_kernels.quantize_kernel import drawn, load_tile
from fp4_kernels.rotation import finish, hadamard_columns, hadamard_tokens, split16
from fp4_kernels.row_copy import load_blocks
from fp4_kernels.spec import NO_TURN, Turn, sign_words

# Tokens / 16 and columns of a tile, warps of a program, and its tiles: for one amax, for two, for those of
# all rows and columns. The best of nine to fourteen measured on an H100.
TILE = (16, 128, 8, 1)
PAIR_TILE = (8, 128, 8, 1)
LINE_TILE = (2, 256, 4, 1)
BLOCK_TILE = (2, 64, 1, 1)  # where rows are rotated by 16: threads own blocks
# A wide rotation along the columns wants eight of them in a thread, one of 128 tokens that many.
WIDE_TILE = (8, 128, 4, 1)
_SIGNS = ("row_lo", "row_hi", "col_lo", "col_hi")


@triton.jit
def _row_peaks(peaks, xs, lo, hi, ROTATION: tl.constexpr, SIGNS: tl.constexpr, FAST: tl.constexpr):
    """``peaks`` raised, tensor by tensor, to the magnitudes of ``xs`` rotated along the columns.

    With FAST and without a rotation, a tensor holds bfloat16 whose magnitudes count; their signs mean
    nothing.
    """
    new = ()
    for i in tl.static_range(len(peaks)):
        if ROTATION > 0:
            v = tl.abs(hadamard_columns(xs[i].to(tl.float32), lo, hi, ROTATION, SIGNS))
            new = new + (max_nan(peaks[i], v),)
        else:
            new = new + (_larger(peaks[i], xs[i], FAST),)
    return new


@triton.jit
def _larger(a, b, FAST: tl.constexpr):
    """A tensor of the larger magnitude, NaN where either is."""
    if FAST and b.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return max_nan(tl.abs(a), tl.abs(b))


@triton.jit
def _first(xs, ROTATION: tl.constexpr, FAST: tl.constexpr):
    """Zeros in the shape and type of ``_row_peaks``."""
    if FAST and ROTATION == 0:
        return tl.zeros_like(xs[0])
    else:
        return tl.zeros(xs[0].shape, tl.float32)


@triton.jit
def _column_peak(
    xs, lo, hi, ROTATION: tl.constexpr, SIGNS: tl.constexpr, INTEGERS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Magnitudes fp32 [TB, BN]: the maximum over the sixteen tensors rotated along the tokens."""
    vs = ()
    for i in tl.static_range(16):
        vs = vs + (widen(xs[i], FAST),)
    if ROTATION == 16:
        return _peak16(vs, lo, hi, SIGNS, INTEGERS)
    else:
        if ROTATION > 0:
            vs = hadamard_tokens(vs, lo, hi, ROTATION, SIGNS, False)
        peak = tl.abs(vs[0])
        for i in tl.static_range(1, len(vs)):
            peak = max_nan(peak, tl.abs(vs[i]))
        return peak


@triton.jit
def _peak16(vs, lo, hi, SIGNS: tl.constexpr, INTEGERS: tl.constexpr):
    """The largest magnitude of sixteen fp32 tensors after a rotation of 16 over the tuple.

    The last butterfly computes a + b and a - b. The larger of their magnitudes is |a| + |b|, so one
    addition gives it.
    INTEGERS: compared by their bits, three at a time: fewer instructions and more registers.
    """
    hs = hadamard_tokens(vs, lo, hi, 16, SIGNS, False, 3)
    peak = tl.abs(hs[0]) + tl.abs(hs[8])
    for i in tl.static_range(1, 8):
        other = tl.abs(hs[i]) + tl.abs(hs[i + 8])
        if INTEGERS:  # noqa: SIM108 (a branch of the compiler's, not a choice of values)
            peak = float_of(tl.maximum(bits_of(peak), bits_of(other)))
        else:
            peak = max_nan(peak, other)
    return peak


@triton.jit
def _block_rows(
    x_ptr, stride, m0, n0, R, C, row_ptr, lo, hi,
    SIGNS: tl.constexpr, BF16: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Amax of BM rows rotated by 16, over STEPS tiles. A thread takes whole blocks of columns."""
    row = tl.zeros([BM, BN // 16], tl.int32)
    for step in tl.static_range(STEPS):
        n = n0 + step * BN
        lower, upper = load_blocks(x_ptr, stride, m0, (m0, n, R, C), BM, BN // 16, EVEN)
        vs = split16(widen(lower, FAST), widen(upper, FAST))
        row = tl.maximum(row, bits_of(_peak16(vs, lo, hi, SIGNS, True)))
    m = m0 + tl.arange(0, BM)
    found = bits_of(_finish_bits(tl.max(row, axis=1), 16, BF16))
    tl.atomic_max(row_ptr + m, found, mask=m < R, sem="relaxed")


@triton.jit
def _magnitude(v):
    """Bits of |v| as fp32: as integers NaN is over Inf is over every number."""
    return bits_of(v.to(tl.float32)) & 0x7FFFFFFF


@triton.jit
def _finish_bits(bits, ROTATION: tl.constexpr, BF16: tl.constexpr):
    """fp32 amaxes from magnitude bits: the rotation's scale and rounding, left out until now."""
    a = float_of(bits)
    if ROTATION > 0:
        a = finish(a, ROTATION, BF16, False)
    return a


@triton.jit
def peaks_of(ys, lo, hi, LEAVE: tl.constexpr, FAST: tl.constexpr):
    """(magnitudes of sixteen tensors [TB, BN] as ``load_tile`` has them, those of their rotated transpose):
    int32 bits [TB, BN], maxima over the sixteen; zeros for the one that LEAVE does not want.

    LEAVE: the last of ``Leave.arguments``. ``leave_peaks`` takes larger ones of several tiles.
    """
    plain = tl.zeros(ys[0].shape, tl.int32)
    turned = plain
    if LEAVE[0]:
        peak = _first(ys, 0, FAST)
        for i in tl.static_range(16):
            peak = _larger(peak, ys[i], FAST)
        plain = _magnitude(peak)
    if LEAVE[1] > 0:
        turned = _magnitude(_column_peak(ys, lo, hi, LEAVE[1], LEAVE[2], False, FAST))
    return plain, turned


@triton.jit
def leave_peaks(amax_ptr, plain, turned, LEAVE: tl.constexpr):
    """Raise amax_ptr[0] and amax_ptr[1] to the two of ``peaks_of``."""
    if LEAVE[0]:
        largest = tl.max(tl.max(plain, axis=1), axis=0)
        tl.atomic_max(amax_ptr, largest, sem="relaxed")
    if LEAVE[1] > 0:
        largest = tl.max(tl.max(turned, axis=1), axis=0)
        found = bits_of(_finish_bits(largest, LEAVE[1], LEAVE[3]))
        tl.atomic_max(amax_ptr + 1, found, sem="relaxed")


@triton.jit
def leave_amaxes(amax_ptr, ys, lo, hi, LEAVE: tl.constexpr, FAST: tl.constexpr):
    """Raise amax_ptr[0] to the amax of sixteen tensors [TB, BN] as ``load_tile`` has them, and amax_ptr[1]
    to that of their rotated transpose: what ``amax_kernel`` would find in what was written.

    LEAVE: the last of ``Leave.arguments``, or None to do nothing.
    """
    if LEAVE is not None:
        plain, turned = peaks_of(ys, lo, hi, LEAVE, FAST)
        leave_peaks(amax_ptr, plain, turned, LEAVE)


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def amax_kernel(
    x_ptr, stride, R, C, work_ptr, out_ptr, programs, row_draw, col_draw,
    row_lo: tl.int64, row_hi: tl.int64, col_lo: tl.int64, col_hi: tl.int64,
    ROW: tl.constexpr, ROW_ROTATION: tl.constexpr, ROW_SIGNS: tl.constexpr, ROW_BF16: tl.constexpr,
    COL: tl.constexpr, COL_ROTATION: tl.constexpr, COL_SIGNS: tl.constexpr, COL_BF16: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out[0] = amax of the row copy, out[1] = amax of the column copy. work: int32 [3], zeros."""
    _, row_lo, row_hi = drawn(row_draw, 0, row_lo, row_hi)
    _, col_lo, col_hi = drawn(col_draw, 0, col_lo, col_hi)
    m0 = tl.program_id(1) * (TB * 16)
    row = tl.zeros([TB, BN], tl.int32)
    col = row
    for step in range(STEPS):
        n0 = (tl.program_id(0) * STEPS + step) * BN
        xs = load_tile(x_ptr, stride, m0, n0, R, C, TB, BN, EVEN)
        if ROW:
            peak = _first(xs, ROW_ROTATION, FAST)
            for i in tl.static_range(16):
                one = _row_peaks((peak,), (xs[i],), row_lo, row_hi, ROW_ROTATION, ROW_SIGNS, FAST)
                peak = one[0]
            row = tl.maximum(row, _magnitude(peak))
        if COL:
            peak_c = _column_peak(xs, col_lo, col_hi, COL_ROTATION, COL_SIGNS, False, FAST)
            col = tl.maximum(col, _magnitude(peak_c))
    if ROW:
        tl.atomic_max(work_ptr + 1, tl.max(tl.max(row, axis=1), axis=0), sem="relaxed")
    if COL:
        tl.atomic_max(work_ptr + 2, tl.max(tl.max(col, axis=1), axis=0), sem="relaxed")
    if tl.atomic_add(work_ptr, 1, sem="acq_rel") == programs - 1:
        if ROW:
            row_max = tl.atomic_xchg(work_ptr + 1, 0, sem="relaxed")
            tl.store(out_ptr, _finish_bits(row_max, ROW_ROTATION, ROW_BF16))
        if COL:
            col_max = tl.atomic_xchg(work_ptr + 2, 0, sem="relaxed")
            tl.store(out_ptr + 1, _finish_bits(col_max, COL_ROTATION, COL_BF16))
        tl.atomic_xchg(work_ptr, 0, sem="relaxed")


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def line_amax_kernel(
    x_ptr, stride, R, C, row_ptr, col_ptr, row_draw, col_draw,
    row_lo: tl.int64, row_hi: tl.int64, col_lo: tl.int64, col_hi: tl.int64,
    ROW: tl.constexpr, ROW_ROTATION: tl.constexpr, ROW_SIGNS: tl.constexpr, ROW_BF16: tl.constexpr,
    COL: tl.constexpr, COL_ROTATION: tl.constexpr, COL_SIGNS: tl.constexpr, COL_BF16: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Amax of every row of both copies, as fp32 bits in int32 buffers that start as zeros.

    A program takes STEPS tiles beside each other, so that threads meet once for all of their rows. Rows
    rotated by 16 are read a second time, from the cache, as threads that own whole blocks of columns.
    """
    BLOCKS: tl.constexpr = ROW and ROW_ROTATION == 16
    _, row_lo, row_hi = drawn(row_draw, 0, row_lo, row_hi)
    _, col_lo, col_hi = drawn(col_draw, 0, col_lo, col_hi)
    first = tl.program_id(0) * STEPS * BN
    m0 = tl.program_id(1) * (TB * 16)
    for step in tl.static_range(STEPS):
        n0 = first + step * BN
        if COL or not BLOCKS:
            xs = load_tile(x_ptr, stride, m0, n0, R, C, TB, BN, EVEN)
        if ROW and not BLOCKS:
            if step == 0:
                zero = _first(xs, ROW_ROTATION, FAST)
                peaks = (zero, zero, zero, zero, zero, zero, zero, zero)
                peaks = peaks + peaks
            peaks = _row_peaks(peaks, xs, row_lo, row_hi, ROW_ROTATION, ROW_SIGNS, FAST)
        if COL:
            col = _column_peak(xs, col_lo, col_hi, COL_ROTATION, COL_SIGNS, True, FAST)
            col = _finish_bits(tl.max(_magnitude(col), axis=0), COL_ROTATION, COL_BF16)
            n = n0 + tl.arange(0, BN)
            tl.atomic_max(col_ptr + n, bits_of(col), mask=n < C, sem="relaxed")
    if BLOCKS:
        _block_rows(
            x_ptr, stride, m0, first, R, C, row_ptr, row_lo, row_hi,
            ROW_SIGNS, ROW_BF16, TB * 16, BN, STEPS, EVEN, FAST,
        )  # fmt: skip
    elif ROW:
        for i in tl.static_range(16):
            m = m0 + tl.arange(0, TB)[:, None] * 16 + i
            row = tl.max(_magnitude(peaks[i]), axis=1, keep_dims=True)
            row = _finish_bits(row, ROW_ROTATION, ROW_BF16)
            tl.atomic_max(row_ptr + m, bits_of(row), mask=m < R, sem="relaxed")


_WORKSPACES: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device) -> Tensor:
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    work = _WORKSPACES.get((device, stream))
    if work is None:
        work = torch.zeros(3, dtype=torch.int32, device=device)
        _WORKSPACES[device, stream] = work
    return work


def _arguments(
    x: Tensor, row: Turn | None, col: Turn | None, tile: tuple[int, int, int, int]
) -> tuple[tuple[int, int], tuple[int, ...], tuple]:
    """(grid, scalars, compile-time constants) of a launch on x [R, C] whose columns are adjacent."""
    tb, bn, _, steps = tile
    rows, cols = x.shape
    row_size, row_signs, row_fp32, _ = row or NO_TURN
    col_size, col_signs, col_fp32, _ = col or NO_TURN
    if (row_size and cols % row_size) or (col_size and rows % col_size):
        raise ValueError(f"a rotation of {row_size} or {col_size} does not divide {list(x.shape)}")
    constants = (
        row is not None, row_size, row_signs is not None, not row_fp32,
        col is not None, col_size, col_signs is not None, not col_fp32,
        tb, bn, steps,
        rows % (tb * 16) == 0 and cols % (bn * steps) == 0, has_fast_casts(x.device),
    )  # fmt: skip
    grid = (-(-cols // (bn * steps)), -(-rows // (tb * 16)))
    return grid, (*sign_words(row_signs), *sign_words(col_signs)), constants


def _is_wide(row: Turn | None, col: Turn | None) -> bool:
    """Whether a rotation reaches over the columns of a thread or the 32 tokens of the least tile."""
    return (row is not None and row.size > 16) or (col is not None and col.size > 32)


def amax(
    x: Tensor,
    *,
    row: Turn | None = NO_TURN,
    col: Turn | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """fp32 [2]: max |x| rotated along its columns, and max |x.T| rotated along x's rows.

    Args:
        x: [R, C] bfloat16, float16 or float32; one of its strides is 1.
        row: the rotation of the first, or None to leave its entry unwritten.
        col: the rotation of the second, likewise.
    """
    if x.stride(1) != 1 and x.shape[1] > 1:
        return amax(x.t(), row=col, col=row, tile=tile).flip(0)
    out = torch.empty(2, dtype=torch.float32, device=x.device)
    if row and col and not row.size and not col.size:
        col = None  # the same number: computed once
        out = amax(x, row=row, tile=tile)
        return out[:1].expand(2)
    if tile is None:
        tile = TILE if col is None else WIDE_TILE if _is_wide(row, col) else PAIR_TILE
    grid, signs, constants = _arguments(x, row, col, tile)
    draws = (row or NO_TURN).draw, (col or NO_TURN).draw
    arguments = x, x.stride(0), *x.shape, _workspace(x.device), out, grid[0] * grid[1], *draws
    launch(amax_kernel, grid, arguments, signs, constants, warps=tile[2])
    return out


def line_amax(
    x: Tensor,
    *,
    row: Turn | None = NO_TURN,
    col: Turn | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(fp32 [R], fp32 [C]): max |.| of every row of x and of x.T, after their rotations."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        c, r = line_amax(x.t(), row=col, col=row, tile=tile)
        return r, c
    if tile is None:
        tile = BLOCK_TILE if row and row.size == 16 else LINE_TILE
        if _is_wide(row, col):
            tile = WIDE_TILE
    rows, cols = x.shape
    buffer = torch.zeros(rows + cols, dtype=torch.int32, device=x.device)
    grid, signs, constants = _arguments(x, row, col, tile)
    draws = (row or NO_TURN).draw, (col or NO_TURN).draw
    arguments = x, x.stride(0), rows, cols, buffer[:rows], buffer[rows:], *draws
    launch(line_amax_kernel, grid, arguments, signs, constants, warps=tile[2])
    found = buffer.view(torch.float32)
    return (found[:rows] if row else None), (found[rows:] if col else None)
