"""GELU, squared ReLU and SwiGLU, forward and backward: every element read and written once, FP32 inside.

    forward     x [, bias] -> y = activation of x + bias
    backward    x [, bias], dy -> dx [, shares of the bias's gradient, the sums of dx's columns]

``bias``: of the linear that wrote x; the sum is rounded to x's type, as a sum of its own would be, and kept
nowhere. Where there is one, or casts will ask for amaxes of what is written (`amax.leave_amaxes`), a program
takes TB * 16 tokens by BN columns as sixteen tensors (``rotation.py`` says why). Such tiles are read more
slowly than rows, on an H100 by less than the pass over the tensor that they save. Otherwise a program takes a
part of one row, and GELU is PyTorch's, which is faster by less than a bias's passes take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.amax import leave_amaxes
from fp4_kernels.column_sums import add_shares, leave_share, shares_for
from fp4_kernels.device import has_fast_casts
from fp4_kernels.quantize_kernel import load_tile
from fp4_kernels.spec import ColumnSums, Leave

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


@triton.jit
def _load_biased(
    x_ptr, bias_ptr, stride, m0, n0, R, C, TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr
):
    """``load_tile`` of x, plus the bias (or None) of its C columns, rounded to x's type."""
    xs = load_tile(x_ptr, stride, m0, n0, R, C, TB, BN, EVEN)
    if bias_ptr is not None:
        n = n0 + tl.arange(0, BN)[None, :]
        bias = tl.load(bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)
        ys = ()
        for i in tl.static_range(16):
            ys = ys + ((xs[i].to(tl.float32) + bias).to(x_ptr.dtype.element_ty),)
        xs = ys
    return xs


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def activation_kernel(
    x_ptr, bias_ptr, out_ptr, amax_ptr, R, C, lo: tl.int64, hi: tl.int64,
    KIND: tl.constexpr, LEAVE: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [R, C] of x [R, C], or for SwiGLU of x [R, 2 C], gate first. LEAVE: as in ``leave_amaxes``.

    bias, a vector as wide as x, may be None; amax too where LEAVE is.
    """
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    width = C
    if KIND == "swiglu":
        width = 2 * C
    xs = _load_biased(x_ptr, bias_ptr, width, m0, n0, R, C, TB, BN, EVEN)
    if KIND == "swiglu":
        up_bias_ptr = bias_ptr
        if bias_ptr is not None:
            up_bias_ptr = bias_ptr + C
        ups = _load_biased(x_ptr + C, up_bias_ptr, width, m0, n0, R, C, TB, BN, EVEN)
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
    x_ptr, bias_ptr, dy_ptr, dx_ptr, shares_ptr, amax_ptr, R, C, lo: tl.int64, hi: tl.int64,
    KIND: tl.constexpr, LEAVE: tl.constexpr,
    TB: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx, shaped as x, of x and dy [R, C], and each row of programs' column sums of it, as shares (or None);
    otherwise as ``activation_kernel``."""
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * (TB * 16)
    width = C
    if KIND == "swiglu":
        width = 2 * C
    xs = _load_biased(x_ptr, bias_ptr, width, m0, n0, R, C, TB, BN, EVEN)
    dys = load_tile(dy_ptr, C, m0, n0, R, C, TB, BN, EVEN)
    if KIND == "swiglu":
        up_bias_ptr = bias_ptr
        if bias_ptr is not None:
            up_bias_ptr = bias_ptr + C
        ups = _load_biased(x_ptr + C, up_bias_ptr, width, m0, n0, R, C, TB, BN, EVEN)
    dxs = ()
    for i in tl.static_range(16):
        dx = dys[i].to(tl.float32) * _slope(xs[i].to(tl.float32), KIND)
        if KIND == "swiglu":
            dx = dx * ups[i].to(tl.float32)
        dxs = dxs + (dx.to(dx_ptr.dtype.element_ty),)
    _store_tile(dx_ptr, width, dxs, m0, n0, R, C, TB, BN, EVEN)
    n = n0 + tl.arange(0, BN)
    share = tl.program_id(1).to(tl.int64) * width + n
    leave_share(shares_ptr, dxs, share, n < C)
    leave_amaxes(amax_ptr, dxs, lo, hi, LEAVE, FAST)
    if KIND == "swiglu":
        dups = ()
        for i in tl.static_range(16):
            dup = dys[i].to(tl.float32) * _value(xs[i].to(tl.float32), KIND)
            dups = dups + (dup.to(dx_ptr.dtype.element_ty),)
        _store_tile(dx_ptr + C, width, dups, m0, n0, R, C, TB, BN, EVEN)
        leave_share(shares_ptr, dups, share + C, n < C)
        leave_amaxes(amax_ptr, dups, lo, hi, LEAVE, FAST)


def _launch(
    kernel: object,
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    kind: str,
    leave: Leave | None,
) -> None:
    rows, columns = shape
    tb, bn, warps = TILE
    even = rows % (tb * 16) == 0 and columns % bn == 0
    grid = (triton.cdiv(columns, bn), triton.cdiv(rows, tb * 16))
    amaxes, words, config = (None, (0, 0), None) if leave is None else leave.arguments()
    assert tensors[0] is not None
    fast = has_fast_casts(tensors[0].device)
    kernel[grid](  # type: ignore[index]  # Triton's launcher
        *tensors, amaxes, rows, columns, *words, kind, config, tb, bn, even, fast, num_warps=warps
    )


def activation(
    x: Tensor, kind: str, *, bias: Tensor | None = None, leave: Leave | None = None
) -> Tensor:
    """[rows, n] of x [rows, n] (swiglu: [rows, 2 n], gate first), contiguous, plus a bias of its width.

    ``kind``: one of KINDS.
    """
    if leave is None and bias is None and kind == "gelu":
        return F.gelu(x)
    rows, n = x.shape[0], x.shape[1] // (2 if kind == "swiglu" else 1)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if (leave is not None or bias is not None) and rows:
        _launch(activation_kernel, (x, bias, out), (rows, n), kind, leave)
    elif rows:
        activation_row_kernel[(rows, triton.cdiv(n, ROW_BLOCK))](x, out, n, kind, ROW_BLOCK)
    return out


def activation_backward(
    x: Tensor,
    dy: Tensor,
    kind: str,
    *,
    bias: tuple[Tensor, ColumnSums | None] | None = None,
    leave: Leave | None = None,
) -> Tensor:
    """dx, shaped as x, of ``activation``'s x and dy [rows, n], both contiguous.

    ``bias``: ``activation``'s, and where its gradient goes (None: nobody asks for it).
    """
    if leave is None and bias is None and kind == "gelu":
        return torch.ops.aten.gelu_backward(dy, x)
    rows, n = dy.shape
    dx = torch.empty_like(x)
    added, sums = (None, None) if bias is None else bias
    shares = None
    if sums is not None:
        shares = shares_for(1, triton.cdiv(rows, TILE[0] * 16), x.shape[1], x.device)
    if (leave is not None or bias is not None) and rows:
        _launch(activation_backward_kernel, (x, added, dy, dx, shares), (rows, n), kind, leave)
    elif rows:
        grid = (rows, triton.cdiv(n, ROW_BLOCK))
        activation_row_backward_kernel[grid](x, dy, dx, n, kind, ROW_BLOCK)
    if sums is not None and shares is not None:
        add_shares(shares, [sums.out], add=sums.add)
    return dx
