"""The Hadamard rotation: spreads an outlier over its block, and cancels in the product of a GEMM.

Sylvester's H is symmetric and orthogonal up to ``sqrt(size)``. Rotating the last (contraction) axis
of BOTH operands by ``diag(signs) @ H / sqrt(size)`` leaves their product as it was, so a rotation
belongs to the GEMM, never to one operand. It is computed as a butterfly, log2(size) rounds of
additions, whose order of operations is part of the definition: kernels repeat it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fp4pretrain.errors import UserError
from fp4pretrain.numerics.blocks import tiles

SIZES = (16, 32, 64, 128)


def signs_te() -> tuple[int, ...]:
    """The 16 fixed signs of Transformer Engine's NVFP4 recipe."""
    return tuple(1 if sign == "+" else -1 for sign in "+++-+------+-+--")


def hadamard_matrix(size: int, *, device: torch.device | None = None) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size), fp32 [size, size].

    Raises:
        UserError: for a size that is not offered.
    """
    _check_size(size)
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), dim=1), torch.cat((h, -h), dim=1)), dim=0)
    return h * torch.tensor(1.0 / math.sqrt(size), device=device)


def rotate(
    x: Tensor,
    *,
    size: int,
    signs: Sequence[int] | Tensor | None = None,
    round_bf16: bool = True,
) -> Tensor:
    """``x.view(-1, size) @ (diag(signs) @ H / sqrt(size))`` along the last axis, computed in fp32.

    In this order: times signs; butterflies (a, b) -> (a + b, a - b) at stride 1, 2, 4, ...; times
    fp32(1 / sqrt(size)); rounded to bfloat16.

    Args:
        x: [..., n], any float dtype, ``size`` dividing n.
        signs: +-1 [size], or None for no signs.
        round_bf16: return bfloat16 (as Transformer Engine does); otherwise fp32.

    Raises:
        UserError: for a size that is not offered or does not divide n.
    """
    _check_size(size)
    if x.shape[-1] % size:
        raise UserError(
            f"rotation.size: {size} does not divide the contraction dimension {x.shape[-1]}; "
            f"use a smaller size or kind=none"
        )
    x_rn = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    factors = torch.ones(size) if signs is None else torch.as_tensor(signs).to(torch.float32)
    out_rn = torch.empty(
        x_rn.shape, dtype=torch.bfloat16 if round_bf16 else torch.float32, device=x.device
    )
    factors_s1 = factors.to(x.device)[:, None]
    for rows, cols in tiles((x_rn.shape[0], x_rn.shape[1]), multiple=size, device=x.device):
        # Rotated axis first: additions then run along contiguous rows, whatever their stride.
        v_nr = x_rn[rows, cols].t().to(torch.float32).contiguous()
        v_gsr = v_nr.view(-1, size, v_nr.shape[1]) * factors_s1
        out_rn[rows, cols] = _butterfly(v_gsr).flatten(0, 1).t()
    return out_rn.view(x.shape)


def _butterfly(v: Tensor) -> Tensor:
    """``H @ v / sqrt(size)`` along dim 1 of [groups, size, columns]; ``v`` is overwritten."""
    groups, size, columns = v.shape
    other, stride = torch.empty_like(v), 1
    while stride < size:
        pairs = groups, size // (2 * stride), 2, stride, columns
        a, b = v.view(pairs).unbind(2)
        sums, differences = other.view(pairs).unbind(2)
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        v, other, stride = other, v, stride * 2
    return v.mul_(torch.tensor(1.0 / math.sqrt(size), device=v.device))


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise UserError(
            f"rotation.size: {size} is not offered; use {' | '.join(str(s) for s in SIZES)}"
        )
