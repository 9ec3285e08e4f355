"""LayerNorm and RMSNorm of the last dimension, and of a sum that is made on the way.

    forward     x [, linear's bias], [residual] -> out, statistics [, total = x + linear's bias + residual]
    backward    x or total, statistics, dy [, dtotal] -> dx = the norm's gradient [+ dtotal], shares of sums
    then        shares -> dw, db and the gradient of the linear's bias, or added to main gradients

Every tensor is read or written once. PyTorch's backward pass reads x and dy twice, once for dx and once for
the weight's gradient; here a program keeps its rows' share of that gradient in registers. Statistics and
sums are FP32; x + bias and a total are rounded to their type, as sums of their own would be. The backward
pass reads a row's statistics, at most 8 bytes, which spares it the sums that they are made of.

Both passes leave the plain amax of what they write, the forward pass a rotated one too. The backward pass has
no registers left to keep sixteen rows. Reading them again from the cache saved 1 us of 63 on an H100 at
[8192, 2048] and lost 4 of 117 at [8192, 4096].
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
# and the registers that each of their threads may then have (sm_90; ROCm's compiler takes no number).
WARPS = 16
REGISTERS: dict[str, Any] = {} if torch.version.hip else {"maxnreg": 128}
LEAST_WARPS = 4  # of a program in the backward pass
ROWS = 2  # rows of a thread in the backward pass, where eight columns a thread make a whole row
KEEP = 4096  # the most columns whose rotated amax the forward pass leaves: it keeps sixteen rows in registers
WIDEST = 16384  # columns that a program can hold
_WARP = 32 * 8  # columns of a warp whose threads have eight neighbours each


class NormCall(NamedTuple):
    """``centered``: LayerNorm, otherwise RMSNorm. ``residual``: what is added to x before it is normed, and
    in the backward pass the gradient of that sum that comes from elsewhere; [rows, N] in x's dtype or None.
    ``leave``: amaxes of what is written; a rotated one in the forward pass alone.
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


def _forward_tile(columns: int, *, turned: bool) -> tuple[int, int, int]:
    """(rows beside each other, columns, warps) of the forward pass. Without a rotated amax a program takes
    few rows and reads nothing ahead: there are many programs."""
    block = triton.next_power_of_2(columns)
    if turned:
        return 1, block, max(1, block // _WARP)
    elements, warps = TILE
    beside = max(1, elements // block)
    return beside, block, warps if beside * block <= elements else 8


def _backward_tile(columns: int) -> tuple[int, int, int, int]:
    """(rows of a thread, rows beside each other, columns, warps) of the backward pass."""
    block = triton.next_power_of_2(columns)
    rows = ROWS if block <= WARPS * _WARP else 1
    warps = min(WARPS, max(LEAST_WARPS, block // _WARP))
    return rows, max(1, LEAST_WARPS * _WARP // block), block, warps


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, call: NormCall) -> Normed:
    """LayerNorm or RMSNorm of x [+ linear's bias] [+ residual] [rows, N], contiguous, N at most ``WIDEST``.

    Raises ValueError where a rotated amax is wanted of rows that sixteen does not divide, or of more than
    ``KEEP`` columns.
    """
    out = torch.empty_like(x)
    total = None if call.residual is None else torch.empty_like(x)
    rows, n = x.shape
    found = torch.empty(2 if call.centered else 1, rows, dtype=torch.float32, device=x.device)
    turned = call.leave is not None and call.leave.turn is not None
    if turned and (rows % LEFT_TURN or n > KEEP):
        raise ValueError(f"no amax of {rows} rows of {n}, rotated by {LEFT_TURN}, is left")
    beside, block, warps = _forward_tile(n, turned=turned)
    amaxes, words, config = (None, (0, 0), None) if call.leave is None else call.leave.arguments()
    if rows:
        norm_kernel[(triton.cdiv(rows, LEFT_TURN if turned else beside),)](
            x, call.linear_bias, call.residual, weight, bias, total, out, found, amaxes,
            rows, n, call.eps, *words, call.centered, config if turned else None, beside, block,
            n == block, has_fast_casts(x.device), num_warps=warps, **(REGISTERS if turned else {}),
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
    are that call's. Raises ValueError where a rotated amax is wanted."""
    if call.leave is not None and call.leave.turn is not None:
        raise ValueError("the backward pass leaves no rotated amax")
    dx = torch.empty_like(x)
    rows, n = x.shape
    together, beside, block, warps = _backward_tile(n)
    tiles = triton.cdiv(rows, together * beside)
    most = 8
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        most = processors * (WARPS // warps)
    each = triton.cdiv(tiles, most)
    programs = triton.cdiv(tiles, each) if tiles else 1
    wanted = (gradients.weight, gradients.bias, gradients.linear_bias)
    outs = [out for out in wanted if out is not None]
    shares = shares_for(len(outs), programs, n, x.device)
    parts = iter(shares)
    dw, db, dlinear = (None if out is None else next(parts) for out in wanted)
    norm_backward_kernel[(programs,)](
        x, statistics, weight, dy, call.residual, dx, dw, db, dlinear,
        None if call.leave is None else call.leave.out,
        rows, n, each, call.centered, together, beside, block, n == block,
        num_warps=warps, **REGISTERS,
    )  # fmt: skip
    add_shares(shares, outs, add=gradients.add)
    return dx
