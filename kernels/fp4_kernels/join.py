"""The gradients of queries, keys and values written beside each other, as their linear's output lies.

    dq [s, b, groups * heads, d], dk and dv [s, b, groups, d]  ->  dqkv [s, b, groups, heads + 2, d]

Every element is read and written once; the amaxes that casts of dqkv will ask for, and shares of the gradient
of the linear's bias, are left on the way. Rotary embeddings turn q and k meanwhile: that is `rope`'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.amax import leave_amaxes
from fp4_kernels.column_sums import add_shares, leave_share, shares_for
from fp4_kernels.device import has_fast_casts
from fp4_kernels.spec import ColumnSums, Leave

TILE = (4, 128, 4)  # tokens / 16, channels at once, warps
_SIGNS = ("lo", "hi")


@triton.jit(do_not_specialize=_SIGNS, do_not_specialize_on_alignment=_SIGNS)
def join_kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, shares_ptr, amax_ptr, T, batch, D,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, lo: tl.int64, hi: tl.int64,
    HEADS: tl.constexpr, LEAVE: tl.constexpr,
    TB: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One head of TB * 16 of the T = s * b tokens, which lie as sixteen tensors [TB, BD] here.

    shares (fp32, column sums of each row of programs) and amax may be None.
    """
    slot = tl.program_id(0)
    g, head = slot // (HEADS + 2), slot % (HEADS + 2)
    m0 = tl.program_id(1) * (TB * 16)
    ptr, stride_s, stride_b = dq_ptr + (g * HEADS + head).to(tl.int64) * q_h, q_s, q_b
    if head == HEADS:
        ptr, stride_s, stride_b = dk_ptr + g.to(tl.int64) * k_h, k_s, k_b
    if head == HEADS + 1:
        ptr, stride_s, stride_b = dv_ptr + g.to(tl.int64) * v_h, v_s, v_b
    width = tl.num_programs(0).to(tl.int64) * D
    for d0 in range(0, D, BD):
        c = d0 + tl.arange(0, BD)[None, :]
        ys = ()
        for i in tl.static_range(16):
            t = (m0 + tl.arange(0, TB)[:, None] * 16 + i).to(tl.int64)
            offset = (t // batch) * stride_s + (t % batch) * stride_b
            ys = ys + (tl.load(ptr + offset + c, mask=(t < T) & (c < D), other=0.0),)
        for i in tl.static_range(16):
            t = (m0 + tl.arange(0, TB)[:, None] * 16 + i).to(tl.int64)
            tl.store(out_ptr + t * width + slot * D + c, ys[i], mask=(t < T) & (c < D))
        channel = d0 + tl.arange(0, BD)
        share = tl.program_id(1) * width + slot * D + channel
        leave_share(shares_ptr, ys, share, channel < D)
        leave_amaxes(amax_ptr, ys, lo, hi, LEAVE, FAST)


def join(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    leave: Leave | None = None,
    sums: ColumnSums | None = None,
) -> Tensor:
    """dqkv [s, b, groups, heads + 2, d] of gradients of any strides; see the head of this file.

    ``sums``: where the gradient of the linear's bias [groups * (heads + 2) * d] goes.
    """
    s, b, groups, d = dk.shape
    heads = dq.shape[2] // groups
    out = torch.empty(s, b, groups, heads + 2, d, dtype=dq.dtype, device=dq.device)
    tb, most, warps = TILE
    programs = triton.cdiv(s * b, tb * 16)
    shares = None
    if sums is not None:
        shares = shares_for(1, programs, groups * (heads + 2) * d, dq.device)
    parts = tuple(part if part.stride(-1) == 1 else part.contiguous() for part in (dq, dk, dv))
    strides = [n for part in parts for n in part.stride()[:3]]
    amaxes, words, config = (None, (0, 0), None) if leave is None else leave.arguments()
    if programs:
        join_kernel[(groups * (heads + 2), programs)](
            *parts, out, shares, amaxes, s * b, b, d, *strides, *words,
            heads, config, tb, min(most, triton.next_power_of_2(d)), has_fast_casts(dq.device),
            num_warps=warps,
        )  # fmt: skip
    if sums is not None and shares is not None:
        add_shares(shares, [sums.out], add=sums.add)
    return out
