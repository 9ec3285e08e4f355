"""The kernels of `norm`: rows normed, and their gradients.

A tile is [U, R, BLOCK]: R rows beside each other, and U rows in each thread, so that nothing moves between
threads when the U are added or taken apart. Where a program takes more than one tile, the next is on its way
while one is normed: a program's threads meet for the sums of a row, and nothing else would be read meanwhile.

With a rotated amax a program of the forward pass takes sixteen tokens, two at a time, and keeps what it has
written in registers. In the backward pass they are full, so it leaves none.
"""

import triton
import triton.language as tl

from fp4_kernels.amax import leave_amaxes
from fp4_kernels.arith import bits_of

_SIGNS = ("lo", "hi")


@triton.jit
def _vector(ptr, column, N, EVEN: tl.constexpr):
    """Columns of a vector [N], zeros outside."""
    if EVEN:
        return tl.load(ptr + column)
    else:
        return tl.load(ptr + column, mask=column < N, other=0.0)


@triton.jit
def _inside(row, column, rows, N, EVEN: tl.constexpr):
    if EVEN:
        return row < rows
    else:
        return (row < rows) & (column < N)


@triton.jit
def _peaks(written, inside, BLOCK: tl.constexpr):
    """Largest bits of magnitudes of the [U, R, BLOCK] written, [R, BLOCK / 8 or 1]. A thread has the U rows
    and eight neighbours, so this moves nothing and leaves few registers to keep."""
    bits = bits_of(tl.where(inside, written.to(tl.float32), 0.0)) & 0x7FFFFFFF
    bits = tl.max(bits, axis=0)
    return tl.max(tl.reshape(bits, [bits.shape[0], (BLOCK + 7) // 8, min(BLOCK, 8)]), axis=2)


@triton.jit
def _load_sum(x_ptr, residual_ptr, row, column, rows, N, EVEN: tl.constexpr):
    """(x, residual) of rows, zeros outside. Where there is no residual it is x, which nobody reads."""
    inside = _inside(row, column, rows, N, EVEN)
    place = row.to(tl.int64) * N + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    residual = x
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + place, mask=inside, other=0.0)
    return x, residual


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def norm_kernel(
    x_ptr, linear_bias_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, statistics_ptr, amax_ptr,
    rows, N, eps, lo: tl.int64, hi: tl.int64,
    CENTERED: tl.constexpr, LEAVE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """out = (t - mean) / deviation * weight + bias of the total t = (x + linear bias) + residual [rows, N],
    of R rows a program.

    No mean unless CENTERED; residual (with total), both biases and amax may be None. LEAVE: the plain and a
    rotated amax as in ``leave_amaxes``, of sixteen rows a program and R of 1; None leaves the plain one.
    EVEN: N is BLOCK.
    """
    T: tl.constexpr = 1 if LEAVE is None else 16
    U: tl.constexpr = min(T, 2)
    first = tl.program_id(0) * (T * R)
    offset = tl.arange(0, R)[None, :, None] * T + tl.arange(0, U)[:, None, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    kept = ()
    ahead = _load_sum(x_ptr, residual_ptr, first + offset, column, rows, N, EVEN)
    for step in tl.static_range(T // U):
        row = first + step * U + offset
        inside = _inside(row, column, rows, N, EVEN)
        place = row.to(tl.int64) * N + column
        x, residual = ahead
        # vectors come from the cache: before what is read ahead, lest they wait for it
        weight = _vector(weight_ptr, column, N, EVEN)
        if bias_ptr is not None:
            bias = _vector(bias_ptr, column, N, EVEN)
        if linear_bias_ptr is not None:
            linear_bias = _vector(linear_bias_ptr, column, N, EVEN)
        if step + 1 < T // U:
            ahead = _load_sum(x_ptr, residual_ptr, row + U, column, rows, N, EVEN)
        if residual_ptr is not None:
            if linear_bias_ptr is not None:
                x = (x.to(tl.float32) + linear_bias.to(tl.float32)).to(x.dtype)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(total_ptr + place, x, mask=inside)
        x = x.to(tl.float32)
        if CENTERED:
            mean = tl.sum(x, axis=2, keep_dims=True) / N
            tl.store(statistics_ptr + rows + row, mean, mask=row < rows)
            x = x - mean
            if not EVEN:
                x = tl.where(column < N, x, 0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=2, keep_dims=True) / N + eps)
        tl.store(statistics_ptr + row, scale, mask=row < rows)
        y = x * scale * weight.to(tl.float32)
        if bias_ptr is not None:
            y += bias.to(tl.float32)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, y, mask=inside)
        if LEAVE is not None:
            kept = kept + tl.split(tl.permute(y, (1, 2, 0)))
        elif amax_ptr is not None:
            peak = _peaks(y, inside, BLOCK)
            tl.atomic_max(amax_ptr, tl.max(tl.max(peak, axis=1), axis=0), sem="relaxed")
    if LEAVE is not None:
        # zeros beside the columns, unless NaN is in their row too
        leave_amaxes(amax_ptr, kept, lo, hi, LEAVE, FAST)


@triton.jit
def _load_gradients(
    x_ptr, statistics_ptr, dy_ptr, dtotal_ptr, row, column, rows, N,
    CENTERED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(x, dy, dtotal, 1 / deviation, mean) of rows, zeros outside. Where there is no dtotal it is dy, where
    there is no mean it is 1 / deviation: nobody reads them."""
    scale = tl.load(statistics_ptr + row, mask=row < rows, other=0.0)
    mean = scale
    if CENTERED:
        mean = tl.load(statistics_ptr + rows + row, mask=row < rows, other=0.0)
    inside = _inside(row, column, rows, N, EVEN)
    place = row.to(tl.int64) * N + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0)
    dtotal = dy
    if dtotal_ptr is not None:
        dtotal = tl.load(dtotal_ptr + place, mask=inside, other=0.0)
    return x, dy, dtotal, scale, mean


@triton.jit
def norm_backward_kernel(
    x_ptr, statistics_ptr, weight_ptr, dy_ptr, dtotal_ptr, dx_ptr, dw_ptr, db_ptr, dlinear_ptr, amax_ptr,
    rows, N, tiles,
    CENTERED: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dx [rows, N], and this program's share of gradients in a row of dw (the weight's), db (the bias's) and
    dlinear (the linear bias's: sums of dx). It takes ``tiles`` times U * R rows.

    dtotal (added to dx), db, dlinear and amax (of dx) may be None. EVEN: N is BLOCK.
    """
    offset = tl.arange(0, R)[None, :, None] * U + tl.arange(0, U)[:, None, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    weight = _vector(weight_ptr, column, N, EVEN).to(tl.float32)
    dw = tl.zeros([R, BLOCK], tl.float32)
    db = tl.zeros([R, BLOCK], tl.float32)
    dlinear = tl.zeros([R, BLOCK], tl.float32)
    peak = tl.zeros([R, (BLOCK + 7) // 8], tl.int32)
    row = tl.program_id(0) * (U * R) + offset
    stride = tl.num_programs(0) * (U * R)
    ahead = _load_gradients(
        x_ptr, statistics_ptr, dy_ptr, dtotal_ptr, row, column, rows, N, CENTERED, EVEN
    )
    for _ in range(tiles):
        x, dy, dtotal, scale, mean = ahead
        ahead = _load_gradients(
            x_ptr, statistics_ptr, dy_ptr, dtotal_ptr, row + stride, column, rows, N, CENTERED, EVEN
        )
        inside = _inside(row, column, rows, N, EVEN)
        x = x.to(tl.float32)
        dy = dy.to(tl.float32)
        g = dy * weight
        if CENTERED:
            x = (x - mean) * scale
            db += tl.sum(dy, axis=0)
            # in one reduction, so that threads meet once
            along, sum_g = tl.split(tl.sum(tl.join(g * x, g), axis=2))
            dx = g - x * (along / N)[:, :, None] - (sum_g / N)[:, :, None]
        else:
            x = x * scale
            dx = g - x * (tl.sum(g * x, axis=2, keep_dims=True) / N)
        dw += tl.sum(dy * x, axis=0)
        dx = dx * scale
        if dtotal_ptr is not None:
            dx += dtotal.to(tl.float32)
        written = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row.to(tl.int64) * N + column, written, mask=inside)
        if dlinear_ptr is not None:
            dlinear += tl.sum(written.to(tl.float32), axis=0)
        if amax_ptr is not None:
            peak = tl.maximum(peak, _peaks(written, inside, BLOCK))
        row += stride
    share = tl.program_id(0) * N + tl.arange(0, BLOCK)
    tl.store(dw_ptr + share, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < N)
    if db_ptr is not None:
        tl.store(db_ptr + share, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < N)
    if dlinear_ptr is not None:
        tl.store(dlinear_ptr + share, tl.sum(dlinear, axis=0), mask=tl.arange(0, BLOCK) < N)
    if amax_ptr is not None:
        tl.atomic_max(amax_ptr, tl.max(tl.max(peak, axis=1), axis=0), sem="relaxed")
