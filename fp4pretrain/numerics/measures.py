"""How much a cast lost: each measure is one fp32 scalar tensor, so it can be logged without a sync.

``x`` is the tensor before the cast and ``y`` after it, of one shape. Sums run in float64: a mean of
squares over millions of elements loses digits in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.numerics.blocks import block_view, spread
from fp4pretrain.numerics.scaling import decoded_scales, operand_scales
from fp4pretrain.numerics.spec import QuantSpec


def relative_error(x: Tensor, y: Tensor) -> Tensor:
    """``||y - x|| / ||x||`` (Frobenius); 0 where y equals x, even if both are 0."""
    noise = torch.linalg.vector_norm(y.double() - x.double())
    signal = torch.linalg.vector_norm(x.double())
    return torch.where(noise == 0, 0.0, noise / signal).float()


def sqnr_db(x: Tensor, y: Tensor) -> Tensor:
    """Signal to quantization noise, ``20 log10(||x|| / ||y - x||)`` in dB; Inf where y equals x."""
    return -20.0 * torch.log10(relative_error(x, y))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """The cosine of the angle between x and y taken as vectors, in [-1, 1]; NaN where one is 0."""
    x_n, y_n = x.double().flatten(), y.double().flatten()
    norms = torch.linalg.vector_norm(x_n) * torch.linalg.vector_norm(y_n)
    return torch.div(torch.dot(x_n, y_n), norms).float()


def underflow_fraction(x: Tensor, y: Tensor) -> Tensor:
    """The share of x's nonzero elements that the cast made 0; 0 where x has none."""
    nonzero = x != 0
    return ((nonzero & (y == 0)).sum() / nonzero.sum().clamp(min=1)).float()


def saturation_fraction(x: Tensor, spec: QuantSpec, *, amax: Tensor | None = None) -> Tensor:
    """The share of x's elements [rows, cols] that are clipped: |x * encode| > the element's max.

    Elements a block scale of 0 sends to 0 count as underflow, not here. bf16 never clips.
    """
    if not spec.quantized or not x.numel():
        return torch.zeros((), device=x.device)
    rows, cols = spec.padded_shape((x.shape[0], x.shape[1]))
    padded = F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0]))
    scales = operand_scales(padded, spec, amax)
    scaled = block_view(padded.float(), spec.block_shape((rows, cols))).abs()
    clipped = scaled * spread(scales.encode) > spec.row.element.max
    return (clipped & spread(decoded_scales(scales.stored) != 0)).sum() / x.numel()
