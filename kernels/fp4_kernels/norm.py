"""LayerNorm and RMSNorm of the last dimension, and of a sum that is made on the way.

    forward     x [, linear's bias], [residual] -> out, statistics [, total = x + linear's bias + residual]
    backward    x or total, statistics, dy [, dtotal] -> dx = the norm's gradient [+ dtotal], shares of sums
    then        shares -> dw, db and the gradient of the linear's bias, or added to main gradients

Every tensor is read or written once. PyTorch's backward pass reads x and dy twice, once for dx and once for
the weight's gradient; here a program keeps its rows' share of that gradient in registers. Statistics and
sums are FP32; x + bias and a total are rounded to their type, as sums of their own would be. The backward
pass reads a row's statistics, at most 8 bytes, which spares it the sums that they are made of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fp4_kernels.column_sums import add_shares, shares_for
from fp4_kernels.device import has_fast_casts
from fp4_kernels.norm_kernel import norm_backward_kernel, norm_kernel
from fp4_kernels.spec import LEFT_TURN, Leave

# Elements of a forward program's tile where a row is shorter, and its warps at that size: the best of four
# measured on an H100.
TILE = (2048, 4)
# In the backward pass, and in the forward pass with a rotated amax: the warps that share a multiprocessor,
# and the registers that each of their threads may then have (sm_90).
WARPS, REGISTERS = 16, 128
LEAST_WARPS = 4  # of a program in the backward pass without one
ROWS = 2  # rows that a thread takes at once
# How the backward pass reads ahead: 1 into registers, more into so many stages of shared memory. With a
# rotated amax it is registers: Triton does not pipeline a loop that has a barrier of its own.
STAGES = 1
# Up to this many columns the forward pass keeps sixteen tokens in registers for the rotated amax. Beyond, it
# reads them again from the cache, as the backward pass does.
KEEP = 4096
WIDEST = 16384  # columns that a program can hold
_THREAD = 8  # neighbours of a row in one thread


class NormCall(NamedTuple):
    """``centered``: LayerNorm, otherwise RMSNorm. ``residual``: what is added to x before it is normed, and
    in the backward pass the gradient of that sum that comes from elsewhere; [rows, N] in x's dtype or None.
    ``leave``: amaxes of what is written; the rotated one only where sixteen divides the rows.
    ``linear_bias``: [N], of the linear that wrote x, added before the residual; forward, and beside a
    residual alone."""

    eps: float
    centered: bool
    residual: Tensor | None = None
    leave: Leave | None = None
    linear_bias: Tensor | None = None


class Normed(NamedTuple):
    """``out`` and ``total`` (the sum that was normed, None without a residual) [rows, N] in x's dtype.
    ``statistics``: fp32 [1 or 2, rows], 1 / deviation of each row and for LayerNorm its mean."""

    out: Tensor
    total: Tensor | None
    statistics: Tensor


class NormGradients(NamedTuple):
    """Where gradients go: fp32 [N], None where there is none; added to what is there, or written.

    ``linear_bias``: of what was added to x, so the sums of dx's columns.
    """

    weight: Tensor
    bias: Tensor | None
    linear_bias: Tensor | None
    add: bool


class _Tile(NamedTuple):
    """The kernels' constants T, U, R, BLOCK and BN, in their order, and a program's warps."""

    tokens: int
    rows: int
    beside: int
    block: int
    chunk: int
    warps: int


def _forward_tile(columns: int) -> _Tile:
    """Of the forward pass without a rotated amax: one row of a thread, nothing read ahead, many programs."""
    elements, warps = TILE
    block = triton.next_power_of_2(columns)
    beside = max(1, elements // block)
    return _Tile(1, 1, beside, block, block, warps if beside * block <= elements else 8)


def _tall_tile(columns: int, *, turned: bool) -> _Tile:
    """Of the others: a thread has eight neighbours of ROWS rows, or more of one row where WARPS are not
    enough."""
    block = triton.next_power_of_2(columns)
    a_warp = 32 * _THREAD
    warps = min(WARPS, max(1 if turned else LEAST_WARPS, block // a_warp))
    rows = ROWS if block <= warps * a_warp else 1
    beside = 1 if turned else max(1, warps * a_warp // block)
    return _Tile(LEFT_TURN if turned else rows, rows, beside, block, min(block, 64 * warps), warps)


def _turns(leave: Leave | None, rows: int) -> bool:
    """Whether a rotated amax is asked for. Raises ValueError where sixteen does not divide the rows."""
    if leave is None or leave.turn is None:
        return False
    if rows % LEFT_TURN:
        raise ValueError(f"a rotation of {LEFT_TURN} does not divide {rows} rows")
    return True


def _options(tile: _Tile) -> dict[str, Any]:
    """Of a launch on a ``_tall_tile``; ROCm's compiler takes no number of registers."""
    return {"num_warps": tile.warps} | ({} if torch.version.hip else {"maxnreg": REGISTERS})


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, call: NormCall) -> Normed:
    """LayerNorm or RMSNorm of x [+ linear's bias] [+ residual] [rows, N], contiguous, N at most ``WIDEST``.

    Raises ValueError where a rotated amax is wanted of rows that sixteen does not divide.
    """
    out = torch.empty_like(x)
    total = None if call.residual is None else torch.empty_like(x)
    rows, n = x.shape
    found = torch.empty(2 if call.centered else 1, rows, dtype=torch.float32, device=x.device)
    turned = _turns(call.leave, rows)
    tile = _tall_tile(n, turned=True) if turned else _forward_tile(n)
    amaxes, words, config = (None, (0, 0), None) if call.leave is None else call.leave.arguments()
    if rows:
        options = _options(tile) if turned else {"num_warps": tile.warps}
        norm_kernel[(triton.cdiv(rows, tile.tokens * tile.beside),)](
            x, call.linear_bias, call.residual, weight, bias, total, out, found, amaxes,
            rows, n, call.eps, *words, call.centered, config if turned else None, n <= KEEP, *tile[:5],
            n == tile.block, has_fast_casts(x.device), **options,
        )  # fmt: skip
    return Normed(out, total, found)


def norm_backward(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    dy: Tensor,
    gradients: NormGradients,
    call: NormCall,
) -> Tensor:
    """dx [rows, N] of ``norm``; ``x`` is what was normed, so its total where there is one, and ``statistics``
    are that call's. Raises as ``norm`` does."""
    dx = torch.empty_like(x)
    rows, n = x.shape
    turned = _turns(call.leave, rows)
    tile = _tall_tile(n, turned=turned)
    tiles = triton.cdiv(rows, tile.tokens * tile.beside)
    most = 8
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        most = processors * (WARPS // tile.warps)
    each = triton.cdiv(tiles, most)
    programs = triton.cdiv(tiles, each) if tiles else 1
    wanted = (gradients.weight, gradients.bias, gradients.linear_bias)
    outs = [out for out in wanted if out is not None]
    shares = shares_for(len(outs), programs, n, x.device)
    parts = iter(shares)
    dw, db, dlinear = (None if out is None else next(parts) for out in wanted)
    amaxes, words, config = (None, (0, 0), None) if call.leave is None else call.leave.arguments()
    norm_backward_kernel[(programs,)](
        x, statistics, weight, dy, call.residual, dx, dw, db, dlinear, amaxes,
        rows, n, each, *words, call.centered, config if turned else None, *tile[:5],
        1 if turned else STAGES, n == tile.block, has_fast_casts(x.device), **_options(tile),
    )  # fmt: skip
    add_shares(shares, outs, add=gradients.add)
    return dx
