"""The largest magnitude of a matrix and of its rotated transpose, in one pass at copy speed.

Magnitudes are compared as integers, so NaN outranks Inf outranks every number, and the result does not
depend on the order of the programs. Scaling and rounding to bfloat16 keep order, so a rotated copy's amax
is taken before them and they are applied to the winner alone.

A launch leaves its scalars in a small workspace whose last program hands them over and clears it: no
second kernel, no memset. Workspaces belong to a stream, where launches follow one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import bits_of, float_of
from fp4_kernels.launch import launch
from fp4_kernels.quantize_kernel import load_tile
from fp4_kernels.rotation import finish, hadamard_columns, hadamard_tokens
from fp4_kernels.spec import sign_words

# Tokens / 16 and columns of a program's tile, and its warps.
TILE = (8, 128, 4)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGNS = ("row_lo", "row_hi", "col_lo", "col_hi")


@triton.jit
def _row_bits(x, lo, hi, ROTATION: tl.constexpr, SIGNS: tl.constexpr):
    """Magnitude bits [TB, BN] of one token's tile, rotated along the columns, before scaling."""
    v = x.to(tl.float32)
    if ROTATION > 0:
        v = hadamard_columns(v, lo, hi, ROTATION, SIGNS)
    return bits_of(v) & _MAGNITUDE


@triton.jit
def _finish_bits(bits, ROTATION: tl.constexpr):
    """fp32 amaxes from magnitude bits: the rotation's scale and rounding, left out until now."""
    a = float_of(bits)
    if ROTATION > 0:
        a = finish(a, ROTATION, False)
    return a


@triton.jit
def _tile_bits(
    xs, row_lo, row_hi, col_lo, col_hi,
    ROW: tl.constexpr, ROW_ROTATION: tl.constexpr, ROW_SIGNS: tl.constexpr,
    COL: tl.constexpr, COL_ROTATION: tl.constexpr, COL_SIGNS: tl.constexpr,
):  # fmt: skip
    """Magnitude bits [TB, BN], the maxima over the sixteen tensors of the rows and of the columns."""
    row = tl.zeros(xs[0].shape, tl.int32)
    col = row
    if ROW:
        for i in tl.static_range(16):
            row = tl.maximum(row, _row_bits(xs[i], row_lo, row_hi, ROW_ROTATION, ROW_SIGNS))
    if COL:
        vs = ()
        for i in tl.static_range(16):
            vs = vs + (xs[i].to(tl.float32),)
        if COL_ROTATION > 0:
            vs = hadamard_tokens(vs, col_lo, col_hi, COL_ROTATION, COL_SIGNS)
        for i in tl.static_range(16):
            col = tl.maximum(col, bits_of(vs[i]) & _MAGNITUDE)
    return row, col


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def amax_kernel(
    x_ptr, stride, R, C, work_ptr, out_ptr, programs,
    row_lo: tl.int64, row_hi: tl.int64, col_lo: tl.int64, col_hi: tl.int64,
    ROW: tl.constexpr, ROW_ROTATION: tl.constexpr, ROW_SIGNS: tl.constexpr,
    COL: tl.constexpr, COL_ROTATION: tl.constexpr, COL_SIGNS: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out[0] = amax of the row copy, out[1] = amax of the column copy. work: int32 [3], zeros."""
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    xs = load_tile(x_ptr, stride, m0, n0, R, C, TB, BN, EVEN)
    row, col = _tile_bits(
        xs, row_lo, row_hi, col_lo, col_hi,
        ROW, ROW_ROTATION, ROW_SIGNS, COL, COL_ROTATION, COL_SIGNS,
    )  # fmt: skip
    if ROW:
        tl.atomic_max(work_ptr + 1, tl.max(tl.max(row, axis=1), axis=0), sem="relaxed")
    if COL:
        tl.atomic_max(work_ptr + 2, tl.max(tl.max(col, axis=1), axis=0), sem="relaxed")
    if tl.atomic_add(work_ptr, 1, sem="acq_rel") == programs - 1:
        if ROW:
            row_max = tl.atomic_xchg(work_ptr + 1, 0, sem="acquire")
            tl.store(out_ptr, _finish_bits(row_max, ROW_ROTATION))
        if COL:
            col_max = tl.atomic_xchg(work_ptr + 2, 0, sem="acquire")
            tl.store(out_ptr + 1, _finish_bits(col_max, COL_ROTATION))
        tl.atomic_xchg(work_ptr, 0, sem="release")


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def line_amax_kernel(
    x_ptr, stride, R, C, row_ptr, col_ptr,
    row_lo: tl.int64, row_hi: tl.int64, col_lo: tl.int64, col_hi: tl.int64,
    ROW: tl.constexpr, ROW_ROTATION: tl.constexpr, ROW_SIGNS: tl.constexpr,
    COL: tl.constexpr, COL_ROTATION: tl.constexpr, COL_SIGNS: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Amax of every row of both copies, as fp32 bits in int32 buffers that start as zeros."""
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    xs = load_tile(x_ptr, stride, m0, n0, R, C, TB, BN, EVEN)
    if ROW:
        for i in tl.static_range(16):
            m = m0 + tl.arange(0, TB) * 16 + i
            row = tl.max(_row_bits(xs[i], row_lo, row_hi, ROW_ROTATION, ROW_SIGNS), axis=1)
            tl.atomic_max(
                row_ptr + m, bits_of(_finish_bits(row, ROW_ROTATION)), mask=m < R, sem="relaxed"
            )
    if COL:
        _, col = _tile_bits(
            xs, row_lo, row_hi, col_lo, col_hi, False, 0, False, True, COL_ROTATION, COL_SIGNS
        )
        n = n0 + tl.arange(0, BN)
        col = bits_of(_finish_bits(tl.max(col, axis=0), COL_ROTATION))
        tl.atomic_max(col_ptr + n, col, mask=n < C, sem="relaxed")


_WORKSPACES: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(device: torch.device) -> Tensor:
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    work = _WORKSPACES.get((device, stream))
    if work is None:
        work = torch.zeros(3, dtype=torch.int32, device=device)
        _WORKSPACES[device, stream] = work
    return work


Rotation = tuple[int, tuple[int, ...] | None]  # size (0: none) and signs


def _arguments(x: Tensor, row: Rotation | None, col: Rotation | None, tile: tuple[int, int, int]):
    """(grid, scalars, compile-time constants) of a launch on x [R, C] whose columns are adjacent."""
    tb, bn, _ = tile
    rows, cols = x.shape
    row_size, row_signs = row or (0, None)
    col_size, col_signs = col or (0, None)
    if (row_size and cols % row_size) or (col_size and rows % col_size):
        raise ValueError(f"a rotation of {row_size} or {col_size} does not divide {list(x.shape)}")
    constants = (
        row is not None, row_size, row_signs is not None,
        col is not None, col_size, col_signs is not None,
        tb, bn, rows % (tb * 16) == 0 and cols % bn == 0,
    )  # fmt: skip
    grid = (-(-cols // bn), -(-rows // (tb * 16)))
    return grid, (*sign_words(row_signs), *sign_words(col_signs)), constants


def amax(
    x: Tensor,
    *,
    row: Rotation | None = (0, None),
    col: Rotation | None = None,
    tile: tuple[int, int, int] = TILE,
) -> Tensor:
    """fp32 [2]: max |x| rotated along its columns, and max |x.T| rotated along x's rows.

    Args:
        x: [R, C] bfloat16, float16 or float32; one of its strides is 1.
        row, col: (rotation size or 0, signs or None); None leaves the entry unwritten.
    """
    if x.stride(1) != 1 and x.shape[1] > 1:
        return amax(x.t(), row=col, col=row, tile=tile).flip(0)
    out = torch.empty(2, dtype=torch.float32, device=x.device)
    if row and col and not row[0] and not col[0]:
        col = None  # the same number: computed once
        out = amax(x, row=row, tile=tile)
        return out[:1].expand(2)
    grid, signs, constants = _arguments(x, row, col, tile)
    arguments = x, x.stride(0), *x.shape, _workspace(x.device), out, grid[0] * grid[1]
    launch(amax_kernel, grid, arguments, signs, constants, warps=tile[2])
    return out


def line_amax(
    x: Tensor,
    *,
    row: Rotation | None = (0, None),
    col: Rotation | None = None,
    tile: tuple[int, int, int] = TILE,
) -> tuple[Tensor | None, Tensor | None]:
    """(fp32 [R], fp32 [C]): max |.| of every row of x and of x.T, after their rotations."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        c, r = line_amax(x.t(), row=col, col=row, tile=tile)
        return r, c
    rows, cols = x.shape
    buffer = torch.zeros(rows + cols, dtype=torch.int32, device=x.device)
    grid, signs, constants = _arguments(x, row, col, tile)
    arguments = x, x.stride(0), rows, cols, buffer[:rows], buffer[rows:]
    launch(line_amax_kernel, grid, arguments, signs, constants, warps=tile[2])
    found = buffer.view(torch.float32)
    return (found[:rows] if row else None), (found[rows:] if col else None)
