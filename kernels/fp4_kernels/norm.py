"""LayerNorm and RMSNorm of the last dimension: one read and one write forward, two reads and one write back.

PyTorch's backward pass reads x and dy twice, once for dx and once for the weight's gradient. Here a program
keeps its rows' share of that gradient in registers, and the shares are added at the end. Statistics and sums
are FP32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a program's tile, where a row is shorter
_PROGRAMS = 2  # a multiprocessor, in the backward pass
WIDEST = 16384  # columns that a program can hold


@triton.jit
def _moments(x, inside, N, eps, CENTERED: tl.constexpr):
    """(x minus its mean where CENTERED, 1 / standard deviation) of rows [R, BLOCK]; zeros outside."""
    if CENTERED:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    return x, tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)[:, None]


@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, N, eps,
    CENTERED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) / deviation * weight + bias of x [rows, N]; no mean unless CENTERED; bias or None."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    x = tl.load(x_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
    x, scale = _moments(x, inside, N, eps, CENTERED)
    y = x * scale * tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, dw_ptr, db_ptr, rows, N, eps, steps,
    CENTERED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [rows, N], and this program's share of the weight's and bias's gradient in a row of dw and db."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dw = tl.zeros([R, BLOCK], tl.float32)
    db = tl.zeros([R, BLOCK], tl.float32)
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
        tl.store(dx_ptr + row * N + column, (dx * scale).to(dx_ptr.dtype.element_ty), mask=inside)
    share = tl.program_id(0) * N + tl.arange(0, BLOCK)
    tl.store(dw_ptr + share, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < N)
    if db_ptr is not None:
        tl.store(db_ptr + share, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < N)


def _tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    block = triton.next_power_of_2(columns)
    rows = max(1, _TILE // block)
    return rows, block, 4 if rows * block <= 4096 else 8


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, centered: bool) -> Tensor:
    """LayerNorm (``centered``) or RMSNorm of x [rows, N], contiguous, N at most ``WIDEST``; x's dtype."""
    out = torch.empty_like(x)
    rows, n = x.shape
    if rows:
        r, block, warps = _tile(n)
        norm_kernel[(triton.cdiv(rows, r),)](
            x, weight, bias, out, rows, n, eps, centered, r, block, num_warps=warps
        )
    return out


def norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, *, eps: float, centered: bool, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx [rows, N], dw [N] and db [N] (None without a bias) of ``norm``; the last two are FP32."""
    dx = torch.empty_like(x)
    rows, n = x.shape
    r, block, warps = _tile(n)
    tiles = triton.cdiv(rows, r)
    most = 8
    if x.is_cuda:
        most = _PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = max(1, min(tiles, most))
    shape = (programs, n)
    shares = torch.empty(shape, dtype=torch.float32, device=x.device)
    bias_shares = torch.empty(shape, dtype=torch.float32, device=x.device) if has_bias else None
    norm_backward_kernel[(programs,)](
        x, weight, dy, dx, shares, bias_shares, rows, n, eps, triton.cdiv(tiles, programs),
        centered, r, block, num_warps=warps,
    )  # fmt: skip
    return dx, shares.sum(dim=0), None if bias_shares is None else bias_shares.sum(dim=0)
