"""GELU, squared ReLU and SwiGLU, forward and backward: every element read and written once, FP32 inside.

    forward     x [, bias] -> y = activation of x + bias
    backward    x [, bias], dy -> dx [, shares of the bias's gradient, the sums of dx's columns]

``bias``: of the linear that wrote x; the sum is rounded to x's type, as a sum of its own would be, and kept
nowhere. A program takes parts of a few rows. Where casts will ask for the amax of what is written, rotated
along the tokens (`amax.leave_amaxes`), or a bias's gradient is summed, a program takes TB * 16 tokens by BN
columns as sixteen tensors (``rotation.py`` says why): on an H100 such tiles reach 0.55 to 0.8 of a copy's
speed, rows 0.8 to 0.94 (docs/gpu.md). GELU alone, with neither bias nor amaxes, is PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.amax import leave_amaxes
from fp4_kernels.arith import bits_of
from fp4_kernels.column_sums import add_shares, leave_share, shares_for
from fp4_kernels.device import has_fast_casts
from fp4_kernels.quantize_kernel import load_tile
from fp4_kernels.spec import ColumnSums, Leave

KINDS = ("gelu", "squared_relu", "swiglu")
# Tokens / 16, columns, warps: the best of seven measured on an H100 with [8192, 16384], forward and backward,
# without and with a bias. They differ by up to a quarter.
TILES = {
    (False, False): (2, 64, 2),
    (False, True): (1, 128, 2),
    (True, False): (1, 128, 2),
    (True, True): (2, 64, 2),
}
ROWS = (1024, 4)  # columns and rows of a program; one row alone costs an amax a third more
_SIGNS = ("lo", "hi")
_ROOT_HALF = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _normal(x):
    """exp(-x^2 / 2) of fp32 x, and the standard normal distribution's share below x, to 3e-7.

    By a polynomial (Abramowitz and Stegun, 7.1.26) and an exponential that the gradient wants too, which is
    less arithmetic than ``tl.erf``; and its tail below zero is not a difference of two numbers near one.
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
def _peaks(written, inside, BLOCK: tl.constexpr):
    """Largest bits of magnitudes of the [BLOCK] written, of eight neighbours each, which a thread has."""
    bits = bits_of(tl.where(inside, written.to(tl.float32), 0.0)) & 0x7FFFFFFF
    return tl.max(tl.reshape(bits, [BLOCK // 8, 8]), axis=1)


@triton.jit
def _vector(ptr, column, N):
    """Columns of a vector [N] as fp32."""
    return tl.load(ptr + column, mask=column < N, other=0.0).to(tl.float32)


@triton.jit
def _row_of(ptr, bias, row, width, column, inside):
    """fp32 columns of a row, plus a bias (fp32, or None), rounded to the matrix's type."""
    x = tl.load(ptr + row * width + column, mask=inside, other=0.0)
    if bias is not None:
        x = (x.to(tl.float32) + bias).to(ptr.dtype.element_ty)
    return x.to(tl.float32)


@triton.jit
def activation_row_kernel(
    x_ptr, bias_ptr, out_ptr, amax_ptr, rows, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [rows, N] of x [rows, N], or for SwiGLU of x [rows, 2 N], gate first.

    bias, a vector as wide as x, and amax (int32 bits, raised to out's) may be None.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = N
    if KIND == "swiglu":
        width = 2 * N
    bias = None
    up_bias = None
    if bias_ptr is not None:
        bias = _vector(bias_ptr, column, N)
        if KIND == "swiglu":
            up_bias = _vector(bias_ptr + N, column, N)
    peaks = tl.zeros([BLOCK // 8], tl.int32)
    for step in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = (column < N) & (row < rows)
        y = _value(_row_of(x_ptr, bias, row, width, column, inside), KIND)
        if KIND == "swiglu":
            y = y * _row_of(x_ptr + N, up_bias, row, width, column, inside)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * N + column, y, mask=inside)
        if amax_ptr is not None:
            peaks = tl.maximum(peaks, _peaks(y, inside, BLOCK))
    if amax_ptr is not None:
        tl.atomic_max(amax_ptr, tl.max(peaks, axis=0), sem="relaxed")


@triton.jit
def activation_row_backward_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, amax_ptr, rows, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx, shaped as x, of x and dy [rows, N]; otherwise as ``activation_row_kernel``."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = N
    if KIND == "swiglu":
        width = 2 * N
    bias = None
    up_bias = None
    if bias_ptr is not None:
        bias = _vector(bias_ptr, column, N)
        if KIND == "swiglu":
            up_bias = _vector(bias_ptr + N, column, N)
    peaks = tl.zeros([BLOCK // 8], tl.int32)
    for step in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        inside = (column < N) & (row < rows)
        x = _row_of(x_ptr, bias, row, width, column, inside)
        dy = tl.load(dy_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
        dx = dy * _slope(x, KIND)
        to = dx_ptr + row * width + column
        if KIND == "swiglu":
            dx = dx * _row_of(x_ptr + N, up_bias, row, width, column, inside)
            dup = (dy * _value(x, KIND)).to(dx_ptr.dtype.element_ty)
            tl.store(to + N, dup, mask=inside)
            if amax_ptr is not None:
                peaks = tl.maximum(peaks, _peaks(dup, inside, BLOCK))
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(to, dx, mask=inside)
        if amax_ptr is not None:
            peaks = tl.maximum(peaks, _peaks(dx, inside, BLOCK))
    if amax_ptr is not None:
        tl.atomic_max(amax_ptr, tl.max(peaks, axis=0), sem="relaxed")


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


def _launch_tiles(
    kernel: object,
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    kind: str,
    leave: Leave | None,
    tile: tuple[int, int, int],
) -> None:
    rows, columns = shape
    tb, bn, warps = tile
    even = rows % (tb * 16) == 0 and columns % bn == 0
    grid = (triton.cdiv(columns, bn), triton.cdiv(rows, tb * 16))
    amaxes, words, config = (None, (0, 0), None) if leave is None else leave.arguments()
    assert tensors[0] is not None
    fast = has_fast_casts(tensors[0].device)
    kernel[grid](  # type: ignore[index]  # Triton's launcher
        *tensors, amaxes, rows, columns, *words, kind, config, tb, bn, even, fast, num_warps=warps
    )


def _launch_rows(
    kernel: object,
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    kind: str,
    leave: Leave | None,
) -> None:
    rows, columns = shape
    block, each = ROWS
    grid = (triton.cdiv(rows, each), triton.cdiv(columns, block))
    kernel[grid](  # type: ignore[index]  # Triton's launcher
        *tensors, leave and leave.out, rows, columns, kind, block, each
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
    if rows and leave is not None and leave.turn is not None:
        tile = TILES[False, bias is not None]
        _launch_tiles(activation_kernel, (x, bias, out), (rows, n), kind, leave, tile)
    elif rows:
        _launch_rows(activation_row_kernel, (x, bias, out), (rows, n), kind, leave)
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
    tile = TILES[True, added is not None]
    shares = None
    if sums is not None:
        shares = shares_for(1, triton.cdiv(rows, tile[0] * 16), x.shape[1], x.device)
    if rows and (shares is not None or (leave is not None and leave.turn is not None)):
        tensors = x, added, dy, dx, shares
        _launch_tiles(activation_backward_kernel, tensors, (rows, n), kind, leave, tile)
    elif rows:
        _launch_rows(activation_row_backward_kernel, (x, added, dy, dx), (rows, n), kind, leave)
    if sums is not None and shares is not None:
        add_shares(shares, [sums.out], add=sums.add)
    return dx
