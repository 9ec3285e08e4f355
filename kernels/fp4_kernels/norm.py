"""LayerNorm and RMSNorm of the last dimension, and of a sum that is made on the way.

    forward     x [, linear's bias], [residual] -> out [, total = x + linear's bias + residual]
    backward    x or total, dy [, dtotal] -> dx = the norm's gradient [+ dtotal], shares of column sums
    then        shares -> dw, db and the gradient of the linear's bias, or added to main gradients

Every tensor is read or written once. PyTorch's backward pass reads x and dy twice, once for dx and once for
the weight's gradient; here a program keeps its rows' share of that gradient in registers. Statistics and
sums are FP32; x + bias and a total are rounded to their type, as sums of their own would be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import bits_of
from fp4_kernels.column_sums import add_shares, shares_for
from fp4_kernels.spec import Leave

# Elements of a program's tile where a row is shorter, and warps at that size: the best of four and, in the
# backward pass, of nine measured on an H100.
TILE = (2048, 4)
BACKWARD_TILE = (4096, 8)
# Registers of a thread of that tile where a linear's bias is summed too. It would take 150 to 162, and one
# program would fit a multiprocessor; so two do, for at most six registers that wait in memory (sm_90).
REGISTERS = 128
PROGRAMS = 2  # a multiprocessor, in the backward pass
WIDEST = 16384  # columns that a program can hold


class NormCall(NamedTuple):
    """``centered``: LayerNorm, otherwise RMSNorm. ``residual``: what is added to x before it is normed, and
    in the backward pass the gradient of that sum that comes from elsewhere; [rows, N] in x's dtype or None.
    ``leave``: amaxes of what is written (no turn). ``linear_bias``: [N], of the linear that wrote x, added
    before the residual; forward, and beside a residual alone."""

    eps: float
    centered: bool
    residual: Tensor | None = None
    leave: Leave | None = None
    linear_bias: Tensor | None = None


class NormGradients(NamedTuple):
    """Where gradients go: fp32 [N], None where there is none; added to what is there, or written.

    ``linear_bias``: of what was added to x, so the sums of dx's columns.
    """

    weight: Tensor
    bias: Tensor | None
    linear_bias: Tensor | None
    add: bool


@triton.jit
def _moments(x, inside, N, eps, CENTERED: tl.constexpr):
    """(x minus its mean where CENTERED, 1 / standard deviation) of rows [R, BLOCK]; zeros outside."""
    if CENTERED:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    return x, tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)[:, None]


@triton.jit
def _peaks(written, inside, R: tl.constexpr, BLOCK: tl.constexpr):
    """Largest bits of magnitudes of the [R, BLOCK] written, [R, BLOCK / 8 or 1]: eight neighbours are of one
    thread, so this moves nothing and leaves an eighth of the registers to keep."""
    bits = bits_of(tl.where(inside, written.to(tl.float32), 0.0)) & 0x7FFFFFFF
    return tl.max(tl.reshape(bits, [R, (BLOCK + 7) // 8, min(BLOCK, 8)]), axis=2)


@triton.jit
def norm_kernel(
    x_ptr, linear_bias_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, amax_ptr, rows, N, eps,
    CENTERED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (t - mean) / deviation * weight + bias of the total t = (x + linear bias) + residual [rows, N].

    No mean unless CENTERED; residual (with total), both biases and amax may be None.
    """
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    x = tl.load(x_ptr + row * N + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        if linear_bias_ptr is not None:
            added = tl.load(linear_bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) + added).to(x_ptr.dtype.element_ty)
        residual = tl.load(residual_ptr + row * N + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * N + column, x, mask=inside)
    x, scale = _moments(x.to(tl.float32), inside, N, eps, CENTERED)
    y = x * scale * tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * N + column, y, mask=inside)
    if amax_ptr is not None:
        peak = _peaks(y, inside, R, BLOCK)
        tl.atomic_max(amax_ptr, tl.max(tl.max(peak, axis=1), axis=0), sem="relaxed")


@triton.jit
def norm_backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dtotal_ptr, dx_ptr, dw_ptr, db_ptr, dlinear_ptr, amax_ptr, rows, N, eps, steps,
    CENTERED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [rows, N], and this program's share of gradients in a row of dw (the weight's), db (the bias's) and
    dlinear (the linear bias's: sums of dx).

    dtotal (added to dx), db, dlinear and amax may be None.
    """
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dw = tl.zeros([R, BLOCK], tl.float32)
    db = tl.zeros([R, BLOCK], tl.float32)
    dlinear = tl.zeros([R, BLOCK], tl.float32)
    peak = tl.zeros([R, (BLOCK + 7) // 8], tl.int32)
    for step in range(steps):
        tile = tl.program_id(0) + step * tl.num_programs(0)
        row = (tile * R + tl.arange(0, R)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < N)
        x = tl.load(x_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
        x, scale = _moments(x, inside, N, eps, CENTERED)
        x = x * scale
        g = dy * weight
        dx = g - x * (tl.sum(g * x, axis=1) / N)[:, None]
        if CENTERED:
            dx -= (tl.sum(g, axis=1) / N)[:, None]
            db += dy
        dw += dy * x
        dx = dx * scale
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
        written = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * N + column, written, mask=inside)
        if dlinear_ptr is not None:
            dlinear += written.to(tl.float32)
        if amax_ptr is not None:
            peak = tl.maximum(peak, _peaks(written, inside, R, BLOCK))
    share = tl.program_id(0) * N + tl.arange(0, BLOCK)
    tl.store(dw_ptr + share, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < N)
    if db_ptr is not None:
        tl.store(db_ptr + share, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < N)
    if dlinear_ptr is not None:
        tl.store(dlinear_ptr + share, tl.sum(dlinear, axis=0), mask=tl.arange(0, BLOCK) < N)
    if amax_ptr is not None:
        tl.atomic_max(amax_ptr, tl.max(tl.max(peak, axis=1), axis=0), sem="relaxed")


def _tile(columns: int, tile: tuple[int, int]) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    elements, warps = tile
    block = triton.next_power_of_2(columns)
    rows = max(1, elements // block)
    return rows, block, warps if rows * block <= elements else 8


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: NormCall
) -> tuple[Tensor, Tensor | None]:
    """(LayerNorm or RMSNorm of x [+ linear's bias] + residual, that sum or None) of x [rows, N], contiguous,
    N at most ``WIDEST``; in x's dtype."""
    out = torch.empty_like(x)
    total = None if call.residual is None else torch.empty_like(x)
    rows, n = x.shape
    if rows:
        r, block, warps = _tile(n, TILE)
        norm_kernel[(triton.cdiv(rows, r),)](
            x, call.linear_bias, call.residual, weight, bias, total, out, call.leave and call.leave.out,
            rows, n, call.eps, call.centered, r, block, num_warps=warps,
        )  # fmt: skip
    return out, total


def norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, gradients: NormGradients, call: NormCall
) -> Tensor:
    """dx [rows, N] of ``norm``; ``x`` is what was normed, x + residual where there was one."""
    dx = torch.empty_like(x)
    rows, n = x.shape
    r, block, warps = _tile(n, BACKWARD_TILE)
    tiles = triton.cdiv(rows, r)
    most = 8
    if x.is_cuda:
        most = PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = max(1, min(tiles, most))
    wanted = (gradients.weight, gradients.bias, gradients.linear_bias)
    outs = [out for out in wanted if out is not None]
    shares = shares_for(len(outs), programs, n, x.device)
    parts = iter(shares)
    dw, db, dlinear = (None if out is None else next(parts) for out in wanted)
    few = {"maxnreg": REGISTERS} if dlinear is not None and r * block <= BACKWARD_TILE[0] else {}
    norm_backward_kernel[(programs,)](
        x, weight, dy, call.residual, dx, dw, db, dlinear, call.leave and call.leave.out,
        rows, n, call.eps, triton.cdiv(tiles, programs), call.centered, r, block, num_warps=warps, **few,
    )  # fmt: skip
    add_shares(shares, outs, add=gradients.add)
    return dx
