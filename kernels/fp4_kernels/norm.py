"""LayerNorm and RMSNorm of the last dimension, and of a sum that is made on the way.

    forward     x [, residual] -> out [, total = x + residual]
    backward    x or total, dy [, dtotal] -> dx = the norm's gradient [+ dtotal], shares of dw and db
    then        shares -> dw and db, or added to main gradients

Every tensor is read or written once. PyTorch's backward pass reads x and dy twice, once for dx and once for
the weight's gradient; here a program keeps its rows' share of that gradient in registers. Statistics and
sums are FP32; a total is rounded to its type before it is normed, as a sum of its own would be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import bits_of
from fp4_kernels.spec import Leave

# Elements of a program's tile where a row is shorter, and warps at that size: the best of four and, in the
# backward pass, of nine measured on an H100.
TILE = (2048, 4)
BACKWARD_TILE = (4096, 8)
PROGRAMS = 2  # a multiprocessor, in the backward pass
SHARES_TILE = (64, 16)  # programs' shares and columns that are added at once
WIDEST = 16384  # columns that a program can hold


class NormCall(NamedTuple):
    """``centered``: LayerNorm, otherwise RMSNorm. ``residual``: what is added to x before it is normed, and
    in the backward pass the gradient of that sum that comes from elsewhere; [rows, N] in x's dtype or None.
    ``leave``: amaxes of what is written (no turn)."""

    eps: float
    centered: bool
    residual: Tensor | None = None
    leave: Leave | None = None


class NormGradients(NamedTuple):
    """Where dw and db go: fp32 [N], ``bias`` None where there is none; added to what is there, or written."""

    weight: Tensor
    bias: Tensor | None
    add: bool


@triton.jit
def _moments(x, inside, N, eps, CENTERED: tl.constexpr):
    """(x minus its mean where CENTERED, 1 / standard deviation) of rows [R, BLOCK]; zeros outside."""
    if CENTERED:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    return x, tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)[:, None]


@triton.jit
def _raised(peak, written, inside):
    """Bits of magnitudes [R, BLOCK] so far, and of what is written."""
    bits = bits_of(tl.where(inside, written.to(tl.float32), 0.0)) & 0x7FFFFFFF
    return tl.maximum(peak, bits)


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, amax_ptr, rows, N, eps,
    CENTERED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (t - mean) / deviation * weight + bias of t = x + residual [rows, N], which goes to total.

    No mean unless CENTERED; residual (with total), bias and amax may be None.
    """
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    x = tl.load(x_ptr + row * N + column, mask=inside, other=0.0)
    if residual_ptr is not None:
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
        peak = _raised(tl.zeros([R, BLOCK], tl.int32), y, inside)
        tl.atomic_max(amax_ptr, tl.max(tl.max(peak, axis=1), axis=0), sem="relaxed")


@triton.jit
def norm_backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dtotal_ptr, dx_ptr, dw_ptr, db_ptr, amax_ptr, rows, N, eps, steps,
    CENTERED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [rows, N], and this program's share of the weight's and bias's gradient in a row of dw and db.

    dtotal (added to dx), db and amax may be None.
    """
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dw = tl.zeros([R, BLOCK], tl.float32)
    db = tl.zeros([R, BLOCK], tl.float32)
    peak = tl.zeros([R, BLOCK], tl.int32)
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
        if amax_ptr is not None:
            peak = _raised(peak, written, inside)
    share = tl.program_id(0) * N + tl.arange(0, BLOCK)
    tl.store(dw_ptr + share, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < N)
    if db_ptr is not None:
        tl.store(db_ptr + share, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < N)
    if amax_ptr is not None:
        tl.atomic_max(amax_ptr, tl.max(tl.max(peak, axis=1), axis=0), sem="relaxed")


@triton.jit
def norm_shares_kernel(
    dw_ptr, db_ptr, out_w_ptr, out_b_ptr, programs, N,
    ADD: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums over the first axis of dw [programs, N] and, by the second row of programs, of db; ADD: added to
    what is there."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    shares_ptr, out_ptr = dw_ptr, out_w_ptr
    if db_ptr is not None:  # noqa: SIM102 (the compiler's branch around a branch of the program)
        if tl.program_id(1) == 1:
            shares_ptr, out_ptr = db_ptr, out_b_ptr
    total = tl.zeros([P, BN], tl.float32)
    for begin in range(0, programs, P):
        share = (begin + tl.arange(0, P))[:, None]
        inside = (share < programs) & (column < N)[None, :]
        total += tl.load(shares_ptr + share * N + column[None, :], mask=inside, other=0.0)
    found = tl.sum(total, axis=0)
    if ADD:
        found += tl.load(out_ptr + column, mask=column < N, other=0.0)
    tl.store(out_ptr + column, found, mask=column < N)


def _tile(columns: int, tile: tuple[int, int]) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    elements, warps = tile
    block = triton.next_power_of_2(columns)
    rows = max(1, elements // block)
    return rows, block, warps if rows * block <= elements else 8


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: NormCall
) -> tuple[Tensor, Tensor | None]:
    """(LayerNorm or RMSNorm of x + residual, that sum or None) of x [rows, N], contiguous, N at most
    ``WIDEST``; in x's dtype."""
    out = torch.empty_like(x)
    total = None if call.residual is None else torch.empty_like(x)
    rows, n = x.shape
    if rows:
        r, block, warps = _tile(n, TILE)
        norm_kernel[(triton.cdiv(rows, r),)](
            x, call.residual, weight, bias, total, out, call.leave and call.leave.out,
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
    biased = gradients.bias is not None
    shares = torch.empty(1 + biased, programs, n, dtype=torch.float32, device=x.device)
    bias_shares = shares[1] if biased else None
    norm_backward_kernel[(programs,)](
        x, weight, dy, call.residual, dx, shares[0], bias_shares, call.leave and call.leave.out,
        rows, n, call.eps, triton.cdiv(tiles, programs), call.centered, r, block, num_warps=warps,
    )  # fmt: skip
    p, bn = SHARES_TILE
    norm_shares_kernel[(triton.cdiv(n, bn), 1 + biased)](
        shares[0], bias_shares, gradients.weight, gradients.bias, programs, n,
        gradients.add, p, bn,
    )  # fmt: skip
    return dx
