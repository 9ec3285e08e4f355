"""The Hadamard rotation: spreads an outlier over its block, and cancels in the product of a GEMM.

Sylvester's H is symmetric and orthogonal up to ``sqrt(size)``. Rotating the last (contraction) axis of
BOTH operands by ``diag(signs) @ H / sqrt(size)`` leaves their product as it was, so a rotation belongs
to the GEMM, never to one operand. It is computed as a butterfly, log2(size) rounds of additions, whose
order of operations is part of the definition: kernels repeat it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fp4pretrain.errors import UserError

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
    v = x.to(torch.float32).unflatten(-1, (-1, size))
    if signs is not None:
        v = v * torch.as_tensor(signs, dtype=torch.float32, device=x.device)
    stride = 1
    while stride < size:
        pairs = v.unflatten(-1, (-1, 2, stride))
        a, b = pairs.unbind(-2)
        v = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    v = (v * torch.tensor(1.0 / math.sqrt(size), device=x.device)).flatten(-2)
    return v.to(torch.bfloat16) if round_bf16 else v


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise UserError(
            f"rotation.size: {size} is not offered; use {' | '.join(str(s) for s in SIZES)}"
        )
