"""Queries, keys and values out of one matrix, the first two with rotary embeddings (arXiv:2104.09864).

    forward     qkv [s, b, groups, heads + 2, d] [+ bias]  ->  q [s, b, groups * heads, d],
                                                               k and v [s, b, groups, d]
    backward    their gradients, of any strides with d adjacent  ->  dqkv [, shares of the bias's gradient]

``heads``: queries a group. Channel c of the first half turns with channel c + d / 2, by the angle of c
(Llama's order). A pass reads and writes every element once; where q, k and v can be views of qkv the forward
one turns them in place, and leaves v alone. ``bias``: of the linear that wrote qkv; the sum is rounded to
qkv's type before it turns, as a sum of its own would be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.column_sums import add_shares, shares_for
from fp4_kernels.spec import ColumnSums


@triton.jit
def _load_half(ptr, offset, H, HALF: tl.constexpr):
    """The two halves [tokens, HALF] of heads at ``offset``, FP32; columns past H are zeros."""
    c = tl.arange(0, HALF)[None, :]
    first = tl.load(ptr + offset + c, mask=c < H, other=0.0).to(tl.float32)
    second = tl.load(ptr + offset + H + c, mask=c < H, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_half(ptr, offset, first, second, counts, H, HALF: tl.constexpr):
    c = tl.arange(0, HALF)[None, :]
    tl.store(ptr + offset + c, first.to(ptr.dtype.element_ty), mask=counts & (c < H))
    tl.store(ptr + offset + H + c, second.to(ptr.dtype.element_ty), mask=counts & (c < H))


@triton.jit
def rope_kernel(
    qkv_ptr, bias_ptr, shares_ptr, angles_ptr, q_ptr, k_ptr, v_ptr, T, batch, groups, H, angle_s, angle_b,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h,
    HEADS: tl.constexpr, WRITTEN: tl.constexpr, BACKWARD: tl.constexpr, TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """One group of TOKENS tokens (of s * b): the first WRITTEN of its heads. BACKWARD writes qkv and turns
    back, and leaves the column sums of its tokens as shares; bias (forward) and shares may be None. q, k and
    v may be parts of qkv, in their places."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    counts = (t < T)[:, None]
    # past the end: the last token again, and nothing is written
    t = tl.minimum(t, T - 1).to(tl.int64)[:, None]
    g = tl.program_id(1)
    s, b = t // batch, t % batch
    c = tl.arange(0, HALF)[None, :]
    angle = tl.load(angles_ptr + s * angle_s + b * angle_b + c, mask=c < H, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACKWARD:
        sin = -sin
    own = ((t * groups + g) * (HEADS + 2)) * (2 * H)
    for head in tl.static_range(WRITTEN):
        if head < HEADS:
            at = s * q_s + b * q_b + (g * HEADS + head) * q_h
            other = q_ptr
        elif head == HEADS:
            at = s * k_s + b * k_b + g * k_h
            other = k_ptr
        else:
            at = s * v_s + b * v_b + g * v_h
            other = v_ptr
        whole = own + head * (2 * H)
        if BACKWARD:
            x, y = _load_half(other, at, H, HALF)
        else:
            x, y = _load_half(qkv_ptr, whole, H, HALF)
            if bias_ptr is not None:
                more_x, more_y = _load_half(bias_ptr, (g * (HEADS + 2) + head) * (2 * H), H, HALF)
                x = (x + more_x).to(qkv_ptr.dtype.element_ty).to(tl.float32)
                y = (y + more_y).to(qkv_ptr.dtype.element_ty).to(tl.float32)
        if head <= HEADS:
            x, y = x * cos - y * sin, y * cos + x * sin
        if BACKWARD:
            _store_half(qkv_ptr, whole, x, y, counts, H, HALF)
            if shares_ptr is not None:
                row = tl.program_id(0).to(tl.int64) * groups + g
                share = (row * (HEADS + 2) + head) * (2 * H) + tl.arange(0, HALF)
                column = tl.arange(0, HALF) < H
                x = tl.where(counts, x.to(qkv_ptr.dtype.element_ty).to(tl.float32), 0.0)
                y = tl.where(counts, y.to(qkv_ptr.dtype.element_ty).to(tl.float32), 0.0)
                tl.store(shares_ptr + share, tl.sum(x, axis=0), mask=column)
                tl.store(shares_ptr + share + H, tl.sum(y, axis=0), mask=column)
        else:
            _store_half(other, at, x, y, counts, H, HALF)


def _tokens(d: int) -> int:
    """Tokens of a program, for heads of d channels."""
    return max(1, min(64, 1024 // triton.next_power_of_2(d // 2)))


def _run(
    qkv: Tensor,
    angles: Tensor,
    parts: tuple[Tensor, ...],
    *,
    bias: Tensor | None = None,
    shares: Tensor | None = None,
    in_place: bool = False,
    backward: bool,
) -> None:
    s, b, groups, heads, d = qkv.shape
    if not s * b:
        return
    tokens = _tokens(d)
    strides = [n for part in parts for n in part.stride()[:3]]
    rope_kernel[(triton.cdiv(s * b, tokens), groups)](
        qkv, bias, shares, angles, *parts, s * b, b, groups, d // 2,
        angles.stride(0), angles.stride(1) if angles.shape[1] > 1 else 0, *strides,
        heads - 2, heads - (in_place and bias is None), backward, tokens, triton.next_power_of_2(d // 2),
    )  # fmt: skip


def split_rotated(
    qkv: Tensor, angles: Tensor, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of qkv [s, b, groups, heads + 2, d], contiguous; see the head of this file. Where heads do
    not share keys, or all share one, they are views of qkv, which is overwritten.

    ``angles``: fp32 [s, 1 or b, d / 2 or more], whose first d / 2 columns count. ``bias``: [groups *
    (heads + 2) * d] or None.
    """
    s, b, groups, heads, d = qkv.shape
    in_place = heads == 3 or groups == 1
    if in_place:
        q = qkv[..., : heads - 2, :].reshape(s, b, groups * (heads - 2), d)
        k, v = qkv[..., heads - 2, :], qkv[..., heads - 1, :]
    else:
        q = torch.empty(s, b, groups * (heads - 2), d, dtype=qkv.dtype, device=qkv.device)
        k, v = (torch.empty(s, b, groups, d, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    _run(qkv, angles, (q, k, v), bias=bias, in_place=in_place, backward=False)
    return q, k, v


def split_rotated_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, angles: Tensor, *, sums: ColumnSums | None = None
) -> Tensor:
    """dqkv [s, b, groups, heads + 2, d] of ``split_rotated``'s gradients; ``sums``: where its bias's goes."""
    s, b, groups, d = dk.shape
    heads = dq.shape[2] // groups
    dqkv = torch.empty(s, b, groups, heads + 2, d, dtype=dq.dtype, device=dq.device)
    shares = None
    if sums is not None:
        programs = triton.cdiv(s * b, _tokens(d))
        shares = shares_for(1, programs, groups * (heads + 2) * d, dq.device)
    parts = tuple(part if part.stride(-1) == 1 else part.contiguous() for part in (dq, dk, dv))
    _run(dqkv, angles, parts, shares=shares, backward=True)
    if sums is not None and shares is not None:
        add_shares(shares, [sums.out], add=sums.add)
    return dqkv
