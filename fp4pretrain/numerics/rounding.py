"""Rounding to a small floating-point grid by arithmetic, and packing 4-bit codes.

Around a magnitude ``a`` the grid has one step, ``2**(max(floor(log2 a), emin) - mantissa_bits)``;
divided by it, rounding to the grid is rounding to an integer. The power of two is the exponent
field of the float itself, so there is no table and no branch, every pass is in place, and one
function serves every element alike.

Where the sign of zero goes: a negative that rounds to zero stays -0.0 (in E2M1 code 8). An exact
-0.0 becomes +0.0 (code 0) below 8 bits, as in Transformer Engine's reference, and stays -0.0 in FP8,
as in every cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4pretrain.numerics.formats import Element

# Zero-dimensional tensors, not Python numbers: PyTorch builds a tensor of a number at every call.
_EXPONENT_FIELD = torch.tensor(0x7F800000, dtype=torch.int32)
# The largest float below a half. Adding a half itself would carry 0.5 - 2^-25 over to 1; with this
# one every tie still reaches its integer when the sum is rounded to even, and nothing else does.
_ALMOST_HALF = 0.49999997


def round_to_grid_(
    y: Tensor,
    element: Element,
    *,
    ties: str,
    noise: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Round fp32 ``y`` onto the element's grid in place, saturating; NaN stays NaN.

    Args:
        ties: "even" or "away", for nearest rounding.
        noise: None for nearest rounding; uint8 bytes k (u = (k + 0.5) / 256), or int64 24-bit
            integers (u = k * 2^-24). A magnitude a becomes the grid's floor of a + u * step(a).
        scratch: fp32 like ``y``, overwritten; one that is reused stays in the cache.
    """
    step = torch.empty_like(y) if scratch is None else scratch
    y.clamp_(-element.max, element.max)
    if element.coded:
        y.add_(0.0)  # -0.0 + 0.0 = +0.0
    torch.bitwise_and(y.view(torch.int32), _EXPONENT_FIELD, out=step.view(torch.int32))
    step.clamp_(2.0**element.emin, 2.0**element.emax).mul_(2.0**-element.mantissa_bits)
    y.div_(step)
    if noise is None and ties == "even":
        y.round_()
    elif noise is None:
        y.add_(torch.full_like(y, _ALMOST_HALF).copysign_(y)).trunc_()
    elif noise.dtype == torch.uint8:
        y.add_(noise.to(torch.float32).add_(0.5).copysign_(y), alpha=2.0**-8).trunc_()
    else:
        # 24 random bits on a 24-bit number: only float64 holds the sum, so that u just below 1
        # never lifts a value that is on the grid already.
        u = noise.to(torch.float64).mul_(2.0**-24).copysign_(y.double())
        y.copy_(u.add_(y).trunc_())
    return y.mul_(step)


def encode(q: Tensor, element: Element) -> Tensor:
    """Codes of fp32 values [..., n] that lie on the element's grid.

    uint8 [..., n / 2] for 4 bits (two codes a byte, the even element in the low nibble), uint8
    [..., n] for 6 bits, values of ``element.dtype`` [..., n] for more.
    """
    if not element.coded:
        return q.to(element.dtype)
    magnitudes = torch.tensor(element.magnitudes, device=q.device)
    index = torch.bucketize(q.abs(), magnitudes, out_int32=True).to(torch.uint8)
    codes = index | (torch.signbit(q).to(torch.uint8) << (element.bits - 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4) if element.packed else codes


def decode(codes: Tensor, element: Element) -> Tensor:
    """fp32 values [..., n] of what ``encode`` made; a sign without magnitude is -0.0."""
    if not element.coded:
        return codes.to(torch.float32)
    positive = torch.tensor(element.magnitudes, device=codes.device)
    values = torch.zeros(1 << element.bits, device=codes.device)
    values[: len(positive)] = positive
    half = 1 << (element.bits - 1)
    values[half : half + len(positive)] = -positive
    if not element.packed:
        return values[codes.long()]
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return pairs[codes.long()].flatten(-2)
