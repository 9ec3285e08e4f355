"""GELU, squared ReLU and SwiGLU, forward and backward: every element read and written once, FP32 inside.

Where casts will ask for amaxes of what is written (`amax.leave_amaxes`), a program takes TB * 16 tokens by BN
columns as sixteen tensors (``rotation.py`` says why). Such tiles are read more slowly than rows, on an H100
by less than the pass over the tensor that they save. Where no amax is asked for, a program takes a part of
one row, and GELU is PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.amax import leave_amaxes
from fp4_kernels.device import has_fast_casts
from fp4_kernels.quantize_kernel import load_tile
from fp4_kernels.spec import Leave

KINDS = ("gelu", "squared_relu", "swiglu")
# Tokens / 16, columns, warps: the best of five measured on an H100, in both passes.
TILE = (2, 64, 2)
ROW_BLOCK = 1024
_SIGNS = ("lo", "hi")
_ROOT_HALF = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _normal(x):
    """exp(-x^2 / 2) of fp32 x, and the standard normal distribution's share below x, to 3e-7.

    By a polynomial (Abramowitz and Stegun, 7.1.26) and an exponential that the gradient wants too: with
    ``tl.erf`` GELU is bound by arithmetic on an H100.
    """
    e = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 * _ROOT_HALF * tl.abs(x))
    p = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    beyond = 0.5 * t * p * e
    return e, tl.where(x < 0.0, beyond, 1.0 - beyond)


@triton.jit
def _value(x, KIND: tl.constexpr):
    """The activation of fp32 x; SwiGLU's without its second factor. NaN stays NaN."""
    if KIND == "gelu":
        _, below = _normal(x)
        return x * below
    elif KIND == "squared_relu":
        r = tl.where(x <= 0.0, 0.0, x)
        return r * r
    else:
        return x * tl.sigmoid(x)


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """Its derivative."""
    if KIND == "gelu":
        e, below = _normal(x)
        return below + x * _DENSITY * e
    elif KIND == "squared_relu":
        return 2.0 * tl.where(x <= 0.0, 0.0, x)
    else:
        share = tl.sigmoid(x)
        return share + x * share * (1.0 - share)


@triton.jit
def activation_row_kernel(x_ptr, out_ptr, N, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, N] of x [rows, N], or for SwiGLU of x [rows, 2 N], gate first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    start = row * N
    if KIND == "swiglu":
        start = row * 2 * N
    y = _value(tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32), KIND)
    if KIND == "swiglu":
        y = y * tl.load(x_ptr + start + N + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_row_backward_kernel(
    x_ptr, dy_ptr, dx_ptr, N, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """dx, shaped as x, of x and dy [rows, N]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    start = row * N
    if KIND == "swiglu":
        start = row * 2 * N
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
    dx = dy * _slope(x, KIND)
    to = dx_ptr + start + column
    if KIND == "swiglu":
        dx = dx * tl.load(x_ptr + start + N + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(to + N, (dy * _value(x, KIND)).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_tile(
    ptr, stride, ys, m0, n0, R, C, TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr
):
    """The inverse of ``load_tile``."""
    n = n0 + tl.arange(0, BN)[None, :]
    for i in tl.static_range(16):
        m = m0 + tl.arange(0, TB)[:, None] * 16 + i
        offset = m.to(tl.int64) * stride + n
        if EVEN:
            tl.store(ptr + offset, ys[i])
        else:
            tl.store(ptr + offset, ys[i], mask=(m < R) & (n < C))


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def activation_kernel(
    x_ptr, out_ptr, amax_ptr, R, C, lo: tl.int64, hi: tl.int64,
    KIND: tl.constexpr, LEAVE: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [R, C] of x [R, C], or for SwiGLU of x [R, 2 C], gate first. LEAVE: as in ``leave_amaxes``."""
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    width = C
    if KIND == "swiglu":
        width = 2 * C
    xs = load_tile(x_ptr, width, m0, n0, R, C, TB, BN, EVEN)
    if KIND == "swiglu":
        ups = load_tile(x_ptr + C, width, m0, n0, R, C, TB, BN, EVEN)
    ys = ()
    for i in tl.static_range(16):
        y = _value(xs[i].to(tl.float32), KIND)
        if KIND == "swiglu":
            y = y * ups[i].to(tl.float32)
        ys = ys + (y.to(out_ptr.dtype.element_ty),)
    _store_tile(out_ptr, C, ys, m0, n0, R, C, TB, BN, EVEN)
    leave_amaxes(amax_ptr, ys, lo, hi, LEAVE, FAST)


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def activation_backward_kernel(
    x_ptr, dy_ptr, dx_ptr, amax_ptr, R, C, lo: tl.int64, hi: tl.int64,
    KIND: tl.constexpr, LEAVE: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx, shaped as x, of x and dy [R, C]; otherwise as ``activation_kernel``."""
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    width = C
    if KIND == "swiglu":
        width = 2 * C
    xs = load_tile(x_ptr, width, m0, n0, R, C, TB, BN, EVEN)
    dys = load_tile(dy_ptr, C, m0, n0, R, C, TB, BN, EVEN)
    if KIND == "swiglu":
        ups = load_tile(x_ptr + C, width, m0, n0, R, C, TB, BN, EVEN)
    dxs = ()
    for i in tl.static_range(16):
        dx = dys[i].to(tl.float32) * _slope(xs[i].to(tl.float32), KIND)
        if KIND == "swiglu":
            dx = dx * ups[i].to(tl.float32)
        dxs = dxs + (dx.to(dx_ptr.dtype.element_ty),)
    _store_tile(dx_ptr, width, dxs, m0, n0, R, C, TB, BN, EVEN)
    leave_amaxes(amax_ptr, dxs, lo, hi, LEAVE, FAST)
    if KIND == "swiglu":
        dups = ()
        for i in tl.static_range(16):
            dup = dys[i].to(tl.float32) * _value(xs[i].to(tl.float32), KIND)
            dups = dups + (dup.to(dx_ptr.dtype.element_ty),)
        _store_tile(dx_ptr + C, width, dups, m0, n0, R, C, TB, BN, EVEN)
        leave_amaxes(amax_ptr, dups, lo, hi, LEAVE, FAST)


def _launch(
    kernel: object, tensors: tuple[Tensor, ...], shape: tuple[int, int], kind: str, leave: Leave
) -> None:
    rows, columns = shape
    tb, bn, warps = TILE
    even = rows % (tb * 16) == 0 and columns % bn == 0
    grid = (triton.cdiv(columns, bn), triton.cdiv(rows, tb * 16))
    amaxes, words, config = leave.arguments()
    fast = has_fast_casts(tensors[0].device)
    kernel[grid](  # type: ignore[index]  # Triton's launcher
        *tensors, amaxes, rows, columns, *words, kind, config, tb, bn, even, fast, num_warps=warps
    )


def activation(x: Tensor, kind: str, *, leave: Leave | None = None) -> Tensor:
    """[rows, n] of x [rows, n] (swiglu: [rows, 2 n], gate first), contiguous. ``kind``: one of KINDS."""
    if leave is None and kind == "gelu":
        return F.gelu(x)
    rows, n = x.shape[0], x.shape[1] // (2 if kind == "swiglu" else 1)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if leave is not None and rows:
        _launch(activation_kernel, (x, out), (rows, n), kind, leave)
    elif rows:
        activation_row_kernel[(rows, triton.cdiv(n, ROW_BLOCK))](x, out, n, kind, ROW_BLOCK)
    return out


def activation_backward(x: Tensor, dy: Tensor, kind: str, *, leave: Leave | None = None) -> Tensor:
    """dx, shaped as x, of ``activation``'s x and dy [rows, n], both contiguous."""
    if leave is None and kind == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    rows, n = dy.shape
    dx = torch.empty_like(x)
    if leave is not None and rows:
        _launch(activation_backward_kernel, (x, dy, dx), (rows, n), kind, leave)
    elif rows:
        grid = (rows, triton.cdiv(n, ROW_BLOCK))
        activation_row_backward_kernel[grid](x, dy, dx, n, kind, ROW_BLOCK)
    return dx
