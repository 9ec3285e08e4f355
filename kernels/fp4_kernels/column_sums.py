"""The last step of sums over tokens: gradients of biases and of norms' weights.

A kernel that writes a matrix keeps the column sums of the rows that each of its programs wrote, its share, in
a row of FP32 shares. Here the shares are added, in an order that only their number decides: no atomics, so
a second run has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import widen

SHARES_TILE = (64, 16)  # shares and columns that are added at once


@triton.jit
def added_rows(total, ys, FAST: tl.constexpr):
    """fp32 [TB, BN], plus the sum of sixteen tensors [TB, BN]."""
    for i in tl.static_range(16):
        total += widen(ys[i], FAST)
    return total


@triton.jit
def leave_share(shares_ptr, ys, place, inside):
    """The column sums of sixteen tensors [TB, BN], to ``place`` [BN] of the shares; None: nothing."""
    if shares_ptr is not None:
        total = ys[0].to(tl.float32)
        for i in tl.static_range(1, 16):
            total += ys[i].to(tl.float32)
        tl.store(shares_ptr + place, tl.sum(total, axis=0), mask=inside)


@triton.jit
def column_sums_kernel(
    shares_ptr, first_ptr, second_ptr, third_ptr, programs, N,
    ADD: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums over the second axis of shares [1, 2 or 3, programs, N], to as many vectors [N]; ADD: added to
    what is there."""
    which = tl.program_id(1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    out_ptr = first_ptr
    if second_ptr is not None:  # noqa: SIM102 (the compiler's branch around a branch of the program)
        if which == 1:
            out_ptr = second_ptr
    if third_ptr is not None:  # noqa: SIM102
        if which == 2:
            out_ptr = third_ptr
    total = tl.zeros([P, BN], tl.float32)
    for begin in range(0, programs, P):
        share = (begin + tl.arange(0, P))[:, None]
        inside = (share < programs) & (column < N)[None, :]
        place = (which * programs + share).to(tl.int64) * N + column[None, :]
        total += tl.load(shares_ptr + place, mask=inside, other=0.0)
    found = tl.sum(total, axis=0)
    if ADD:
        found += tl.load(out_ptr + column, mask=column < N, other=0.0)
    tl.store(out_ptr + column, found, mask=column < N)


def shares_for(vectors: int, programs: int, columns: int, device: torch.device) -> Tensor:
    """Memory for the shares of 1 to 3 vectors: fp32 [vectors, programs, columns]."""
    return torch.empty(vectors, programs, columns, dtype=torch.float32, device=device)


def add_shares(shares: Tensor, outs: Sequence[Tensor], *, add: bool) -> None:
    """Sums of shares [vectors, programs, N] over programs, to ``outs``, fp32 [N] each; ``add``: to what is
    there."""
    vectors, programs, n = shares.shape
    p, bn = SHARES_TILE
    first, second, third = (*outs, None, None)[:3]
    column_sums_kernel[(triton.cdiv(n, bn), vectors)](
        shares, first, second, third, programs, n, add, p, bn
    )
