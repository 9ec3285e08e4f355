"""GELU, squared ReLU and SwiGLU, forward and backward: every element read and written once, FP32 inside.

    forward     x [, bias] -> y = activation of x + bias
    backward    x [, bias], dy -> dx [, shares of the bias's gradient, the sums of dx's columns]

``bias``: of the linear that wrote x; the sum is rounded to x's type, as a sum of its own would be, and kept
nowhere. A program takes parts of a few rows. Where casts will ask for the amax of what is written, rotated
along the tokens (`amax.leave_amaxes`), or a bias's gradient is summed, it takes sixteen rows at a time, since
a thread has to hold sixteen tokens of a column. GELU alone, with neither bias nor amaxes, is PyTorch's.

Memory is the bound only as long as an element takes some 35 instructions at most (67M elements in 89 us of
an H100). So exponentials and reciprocals are the hardware's, and the width of a matrix is a compile-time
constant, which leaves sixteen rows no address to compute: 26 instructions for GELU with both amaxes, 28 for
its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.amax import leave_peaks, raise_peaks
from fp4_kernels.arith import max_nan, near_exp2, near_reciprocal, widen
from fp4_kernels.column_sums import add_shares, added_rows, shares_for
from fp4_kernels.device import has_fast_casts
from fp4_kernels.spec import ColumnSums, Leave

KINDS = ("gelu", "squared_relu", "swiglu")
# Groups of sixteen rows, columns, warps, by whether it is SwiGLU: four columns a thread but two
# where one has three inputs. The best of five to seven measured on an H100; they differ by up to a sixth.
TILES = {False: (1, 512, 4), True: (1, 256, 2)}
BACKWARD_TILES = {False: (1, 512, 4), True: (1, 256, 4)}
SUMMED = 4  # groups where a bias's gradient is summed: fewer shares, and no slower
ROWS = (1024, 4)  # columns and rows of a program; one row alone costs an amax a third more
_SIGNS = ("lo", "hi")
_PLAIN = tl.constexpr((True, 0, False, False))  # a ``Leave`` of the amax alone
_LOG2_E = tl.constexpr(1.4426950408889634)
_STRETCH = tl.constexpr(0.23164190)  # Abramowitz and Stegun's 0.3275911 / sqrt(2)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _tail(x, FAST: tl.constexpr):
    """(e, w) of fp32 x: e = exp(-x^2 / 2), and e * w is the normal distribution's share beyond |x|, to 3e-7.

    A polynomial (Abramowitz and Stegun, 7.1.26) and an exponential that the gradient wants too are less
    arithmetic than ``tl.erf``. The tail itself is computed, not a difference of two numbers near one.
    """
    e = near_exp2(x * (x * (-0.5 * _LOG2_E)), FAST)
    t = near_reciprocal(tl.fma(tl.abs(x), _STRETCH, 1.0), FAST)
    p = tl.fma(t, tl.fma(t, 0.5307027145, -0.7265760135), 0.7107068705)
    return e, t * tl.fma(t, tl.fma(t, p, -0.142248368), 0.127414796)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    return near_reciprocal(1.0 + near_exp2(x * -_LOG2_E, FAST), FAST)


@triton.jit
def _value(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """The activation of fp32 x; SwiGLU's without its second factor. NaN stays NaN."""
    if KIND == "gelu":
        e, w = _tail(x, FAST)
        return tl.fma(tl.abs(x), -(e * w), tl.maximum(x, 0.0))
    elif KIND == "squared_relu":
        r = max_nan(x, 0.0)
        return r * r
    else:
        return x * _sigmoid(x, FAST)


@triton.jit
def _slope(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """Its derivative."""
    if KIND == "gelu":
        e, w = _tail(x, FAST)
        w = tl.fma(tl.abs(x), -_DENSITY, w)
        return tl.where(x < 0.0, e * w, tl.fma(-e, w, 1.0))
    elif KIND == "squared_relu":
        return 2.0 * max_nan(x, 0.0)
    else:
        share = _sigmoid(x, FAST)
        return tl.fma(x * share, 1.0 - share, share)


@triton.jit
def _vector(ptr, column, N):
    """Columns of a vector [N] as fp32."""
    return tl.load(ptr + column, mask=column < N, other=0.0).to(tl.float32)


@triton.jit
def _row_of(ptr, bias, row, width, column, inside):
    """fp32 columns of a row, plus a bias (fp32, or None), rounded to the matrix's type."""
    x = tl.load(ptr + row * width + column, mask=inside)
    if bias is not None:
        x = (x.to(tl.float32) + bias).to(ptr.dtype.element_ty)
    return x.to(tl.float32)


@triton.jit
def _leave_amax(amax_ptr, ys, inside, FAST: tl.constexpr):
    """Raise amax_ptr[0], unless it is None, to the amax of tensors [1, BLOCK] where they are ``inside``."""
    if amax_ptr is not None:
        none = tl.zeros(ys[0].shape, tl.int32)
        peaks, _ = raise_peaks(none, none, ys, 0, 0, _PLAIN, FAST)
        leave_peaks(amax_ptr, tl.where(inside, peaks, 0), none, _PLAIN)


@triton.jit
def activation_row_kernel(
    x_ptr, bias_ptr, out_ptr, amax_ptr, rows, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [rows, N] of x [rows, N], or for SwiGLU of x [rows, 2 N], gate first.

    bias, a vector as wide as x, and amax (int32 bits, raised to out's) may be None.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < N
    width = N
    if KIND == "swiglu":
        width = 2 * N
    bias = None
    up_bias = None
    if bias_ptr is not None:
        bias = _vector(bias_ptr, column, N)
        if KIND == "swiglu":
            up_bias = _vector(bias_ptr + N, column, N)
    ys = ()
    for step in tl.static_range(ROWS):
        row = tl.minimum(tl.program_id(0) * ROWS + step, rows - 1).to(tl.int64)
        y = _value(_row_of(x_ptr, bias, row, width, column, inside), KIND, FAST)
        if KIND == "swiglu":
            y = y * _row_of(x_ptr + N, up_bias, row, width, column, inside)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * N + column, y, mask=inside)
        ys = ys + (y,)
    _leave_amax(amax_ptr, ys, inside, FAST)


@triton.jit
def activation_row_backward_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, amax_ptr, rows, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx, shaped as x, of x and dy [rows, N]; otherwise as ``activation_row_kernel``."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < N
    width = N
    if KIND == "swiglu":
        width = 2 * N
    bias = None
    up_bias = None
    if bias_ptr is not None:
        bias = _vector(bias_ptr, column, N)
        if KIND == "swiglu":
            up_bias = _vector(bias_ptr + N, column, N)
    ys = ()
    for step in tl.static_range(ROWS):
        row = tl.minimum(tl.program_id(0) * ROWS + step, rows - 1).to(tl.int64)
        x = _row_of(x_ptr, bias, row, width, column, inside)
        dy = tl.load(dy_ptr + row * N + column, mask=inside).to(tl.float32)
        dx = dy * _slope(x, KIND, FAST)
        to = dx_ptr + row * width + column
        if KIND == "swiglu":
            dx = dx * _row_of(x_ptr + N, up_bias, row, width, column, inside)
            dup = (dy * _value(x, KIND, FAST)).to(dx_ptr.dtype.element_ty)
            tl.store(to + N, dup, mask=inside)
            ys = ys + (dup,)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(to, dx, mask=inside)
        ys = ys + (dx,)
    _leave_amax(amax_ptr, ys, inside, FAST)


@triton.jit
def _load_rows(at, bias, m, inside, R, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """Sixteen tensors [1, BN], row m, which is at ``at``, and the next; plus a bias (fp32, or None), rounded
    to the matrix's type. EVEN: all sixteen rows are there. What is not ``inside`` means nothing."""
    xs = ()
    for i in tl.static_range(16):
        if EVEN:
            x = tl.load(at + i * STRIDE, mask=inside)
        else:
            x = tl.load(
                at + i * STRIDE, mask=(m + i < R) & (True if inside is None else inside), other=0.0
            )
        if bias is not None:
            x = (x.to(tl.float32) + bias).to(x.dtype)
        xs = xs + (x,)
    return xs


@triton.jit
def _store_row(to, y, m, inside, R, EVEN: tl.constexpr):
    """One row of sixteen."""
    if EVEN:
        tl.store(to, y, mask=inside)
    else:
        tl.store(to, y, mask=(m < R) & (True if inside is None else inside))


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def activation_kernel(
    x_ptr, bias_ptr, out_ptr, amax_ptr, R, lo: tl.int64, hi: tl.int64,
    C: tl.constexpr, KIND: tl.constexpr, LEAVE: tl.constexpr,
    GROUPS: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out [R, C] of x [R, C], or for SwiGLU of x [R, 2 C], gate first. LEAVE: as in ``leave_amaxes``.

    bias, a vector as wide as x, may be None; amax too where LEAVE is. EVEN: sixteen divides R.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    m0 = tl.program_id(1) * (GROUPS * 16)
    WIDTH: tl.constexpr = 2 * C if KIND == "swiglu" else C
    inside = None if C % BN == 0 else n < C
    bias = None
    up_bias = None
    if bias_ptr is not None:
        bias = _vector(bias_ptr, n, C)
        if KIND == "swiglu":
            up_bias = _vector(bias_ptr + C, n, C)
    x_first = x_ptr + m0.to(tl.int64) * WIDTH + n
    out_first = out_ptr + m0.to(tl.int64) * C + n
    plain = tl.zeros([1, BN], tl.int32)
    turned = plain
    for m in range(0, tl.minimum(GROUPS * 16, R - m0), 16):
        x_at = x_first + m * WIDTH
        xs = _load_rows(x_at, bias, m0 + m, inside, R, WIDTH, EVEN)
        if KIND == "swiglu":
            ups = _load_rows(x_at + C, up_bias, m0 + m, inside, R, WIDTH, EVEN)
        out_at = out_first + m * C
        ys = ()
        for i in tl.static_range(16):
            y = _value(widen(xs[i], FAST), KIND, FAST)
            if KIND == "swiglu":
                y = y * widen(ups[i], FAST)
            y = y.to(out_ptr.dtype.element_ty)
            _store_row(out_at + i * C, y, m0 + m + i, inside, R, EVEN)
            ys = ys + (y,)
        plain, turned = raise_peaks(plain, turned, ys, lo, hi, LEAVE, FAST)
    if inside is not None:
        plain = tl.where(inside, plain, 0)
        turned = tl.where(inside, turned, 0)
    leave_peaks(amax_ptr, plain, turned, LEAVE)


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def activation_backward_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, shares_ptr, amax_ptr, R, lo: tl.int64, hi: tl.int64,
    C: tl.constexpr, KIND: tl.constexpr, LEAVE: tl.constexpr,
    GROUPS: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx, shaped as x, of x and dy [R, C], and each row of programs' column sums of it, as shares (or None);
    otherwise as ``activation_kernel``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    m0 = tl.program_id(1) * (GROUPS * 16)
    WIDTH: tl.constexpr = 2 * C if KIND == "swiglu" else C
    inside = None if C % BN == 0 else n < C
    bias = None
    up_bias = None
    if bias_ptr is not None:
        bias = _vector(bias_ptr, n, C)
        if KIND == "swiglu":
            up_bias = _vector(bias_ptr + C, n, C)
    x_first = x_ptr + m0.to(tl.int64) * WIDTH + n
    dy_first = dy_ptr + m0.to(tl.int64) * C + n
    dx_first = dx_ptr + m0.to(tl.int64) * WIDTH + n
    plain = tl.zeros([1, BN], tl.int32)
    turned = plain
    share = tl.zeros([1, BN], tl.float32)
    up_share = share
    for m in range(0, tl.minimum(GROUPS * 16, R - m0), 16):
        x_at = x_first + m * WIDTH
        xs = _load_rows(x_at, bias, m0 + m, inside, R, WIDTH, EVEN)
        dys = _load_rows(dy_first + m * C, None, m0 + m, inside, R, C, EVEN)
        if KIND == "swiglu":
            ups = _load_rows(x_at + C, up_bias, m0 + m, inside, R, WIDTH, EVEN)
        dx_at = dx_first + m * WIDTH
        dxs = ()
        dups = ()
        for i in tl.static_range(16):
            x = widen(xs[i], FAST)
            dy = widen(dys[i], FAST)
            dx = dy * _slope(x, KIND, FAST)
            if KIND == "swiglu":
                dx = dx * widen(ups[i], FAST)
                dup = (dy * _value(x, KIND, FAST)).to(dx_ptr.dtype.element_ty)
                _store_row(dx_at + (i * WIDTH + C), dup, m0 + m + i, inside, R, EVEN)
                dups = dups + (dup,)
            dx = dx.to(dx_ptr.dtype.element_ty)
            _store_row(dx_at + i * WIDTH, dx, m0 + m + i, inside, R, EVEN)
            dxs = dxs + (dx,)
        plain, turned = raise_peaks(plain, turned, dxs, lo, hi, LEAVE, FAST)
        if shares_ptr is not None:
            share = added_rows(share, dxs, FAST)
        if KIND == "swiglu":
            plain, turned = raise_peaks(plain, turned, dups, lo, hi, LEAVE, FAST)
            if shares_ptr is not None:
                up_share = added_rows(up_share, dups, FAST)
    if shares_ptr is not None:
        place = tl.program_id(1).to(tl.int64) * WIDTH + n
        tl.store(shares_ptr + place, share, mask=inside)
        if KIND == "swiglu":
            tl.store(shares_ptr + place + C, up_share, mask=inside)
    if inside is not None:
        plain = tl.where(inside, plain, 0)
        turned = tl.where(inside, turned, 0)
    leave_peaks(amax_ptr, plain, turned, LEAVE)


def _launch_tiles(
    kernel: object,
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    kind: str,
    leave: Leave | None,
    tile: tuple[int, int, int],
) -> None:
    rows, columns = shape
    groups, bn, warps = tile
    grid = (triton.cdiv(columns, bn), triton.cdiv(rows, groups * 16))
    amaxes, words, config = (None, (0, 0), None) if leave is None else leave.arguments()
    assert tensors[0] is not None
    fast = has_fast_casts(tensors[0].device)
    constants = columns, kind, config, groups, bn, rows % 16 == 0, fast
    kernel[grid](*tensors, amaxes, rows, *words, *constants, num_warps=warps)  # type: ignore[index]  # Triton's launcher


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
    assert tensors[0] is not None
    fast = has_fast_casts(tensors[0].device)
    kernel[grid](  # type: ignore[index]  # Triton's launcher
        *tensors, leave and leave.out, rows, columns, kind, block, each, fast
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
        tile = TILES[kind == "swiglu"]
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
    tile = BACKWARD_TILES[kind == "swiglu"]
    shares = None
    if sums is not None:
        tile = (SUMMED, *tile[1:])
        shares = shares_for(1, triton.cdiv(rows, tile[0] * 16), x.shape[1], x.device)
    if rows and (shares is not None or (leave is not None and leave.turn is not None)):
        tensors = x, added, dy, dx, shares
        _launch_tiles(activation_backward_kernel, tensors, (rows, n), kind, leave, tile)
    elif rows:
        _launch_rows(activation_row_backward_kernel, (x, added, dy, dx), (rows, n), kind, leave)
    if sums is not None and shares is not None:
        add_shares(shares, [sums.out], add=sums.add)
    return dx
