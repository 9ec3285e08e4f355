"""silu(gate) * up of a matrix [rows, 2 n] that holds both: one kernel forward, one backward (FP32 inside)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out [rows, N] = silu(x[:, :N]) * x[:, N:]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    gate = tl.load(x_ptr + row * 2 * N + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * N + N + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * N + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(x_ptr, dy_ptr, dx_ptr, N, BLOCK: tl.constexpr):
    """dx [rows, 2 N]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    gate = tl.load(x_ptr + row * 2 * N + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * N + N + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    dgate = dy * up * (share + silu * (1.0 - share))
    to = dx_ptr + row * 2 * N + column
    tl.store(to, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to + N, (dy * silu).to(dx_ptr.dtype.element_ty), mask=inside)


def swiglu(x: Tensor) -> Tensor:
    """[rows, n] of x [rows, 2 n], contiguous."""
    rows, n = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows:
        swiglu_kernel[(rows, triton.cdiv(n, BLOCK))](x, out, n, BLOCK)
    return out


def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """dx [rows, 2 n] of x [rows, 2 n] and dy [rows, n], contiguous."""
    rows, n = dy.shape
    dx = torch.empty_like(x)
    if rows:
        swiglu_backward_kernel[(rows, triton.cdiv(n, BLOCK))](x, dy, dx, n, BLOCK)
    return dx
