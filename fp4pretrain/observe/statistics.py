"""What casts did to tensors: sums are added over microbatches and ranks, and turned into statistics at the
end.

x is the tensor as it is rounded: in the operand's orientation, padded, rotated where its GEMM rotates.
y is what the GEMM multiplies, the operand dequantized. A sum is taken where the tensors are, in float64,
and nothing is read back, so an observed step waits for no device until its numbers are written.

statistic         unit      what it is
sqnr              dB        10 log10(sum x^2 / sum (y - x)^2)
cosine            1         of x and y as vectors
underflow         share     of the elements of x that are not 0: y is 0 there
saturation        share     of all elements: clipped at the format's largest value
inexact           share     of all elements: the backend's y is not the format's own value
kurtosis          1         mean x^4 / (mean x^2)^2: 3 for normal numbers, more with outliers
crest             1         largest |x| / root mean square
amax_spread       octaves   standard deviation of log2 of the largest magnitude of a block
scales            share     of blocks, by the octave of their stored scale
draws             1         bias and standard deviation of stochastic rounding over k more draws, of |x|
gradient_noise    1         weight gradient / (sqrt(3) x its quantization noise); see ``watcher``
oscillation       share     of weights whose cast moved more than 4 times as far as they did; see ``watcher``
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.numerics.blocks import block_amax, block_view, spread
from fp4pretrain.numerics.scaling import BlockScales, decoded_scales, operand_scales

STATISTICS = (
    "sqnr", "cosine", "underflow", "saturation", "inexact", "kurtosis", "crest", "amax_spread",
    "scales", "draws", "gradient_noise", "oscillation",
)  # fmt: skip
# The entries of a vector of sums; the octaves of stored scales, 2^LOWEST and up, come after them.
SUMS = (
    "elements", "xx", "xxxx", "ee", "xy", "yy", "nonzero", "underflow", "saturated", "inexact",
    "blocks", "log_amax", "log_amax2", "drawn_xx", "drawn_bias", "drawn_variance",
    "gradient", "noise", "weights", "oscillating",
)  # fmt: skip
LOWEST, OCTAVES = -150, 300
LENGTH = len(SUMS) + OCTAVES
AT = {name: index for index, name in enumerate(SUMS)}


def of_cast(x: Tensor, y: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The sums that x and y [rows, cols] give by themselves; float64 scalars."""
    x, y = x.float(), y.float()
    found = {"elements": _count(x), "xx": _sum(x * x), "ee": _sum((y - x).square_())}
    if "cosine" in wanted:
        found |= {"xy": _sum(x * y), "yy": _sum(y * y)}
    if "underflow" in wanted:
        nonzero = x != 0
        found |= {"nonzero": _sum(nonzero), "underflow": _sum(nonzero & (y == 0))}
    if "kurtosis" in wanted:
        # in units of a power of two near the largest: a fourth power of small gradients is 0 in fp32
        unit = torch.exp2(torch.floor(torch.log2(x.abs().amax().clamp(min=1e-37))))
        found["xxxx"] = _sum((x / unit).pow_(4)) * unit.double() ** 4
    return found


def of_blocks(
    x: Tensor, spec: QuantSpec, amax: Tensor | None, wanted: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The sums over the blocks of x [rows, cols], and blocks by octave of their scale [OCTAVES].

    ``amax``: the outermost amaxes, of the whole tensor where other ranks hold a part of it.
    """
    rows, cols = spec.padded_shape((x.shape[0], x.shape[1]))
    x = F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0])).float()
    found: dict[str, Tensor] = {}
    if "amax_spread" in wanted:
        amax_b = block_amax(x, spec.block_shape((rows, cols)))
        used = amax_b > 0
        log_b = torch.log2(amax_b.clamp(min=1e-45).double()) * used
        found |= {"blocks": _sum(used), "log_amax": log_b.sum(), "log_amax2": (log_b * log_b).sum()}
    if not {"saturation", "scales"}.intersection(wanted):
        return found, None
    scales = operand_scales(x, spec, amax)
    if "saturation" in wanted:
        found["saturated"] = _saturated(x, scales, spec)
    return found, octaves(scales.stored) if "scales" in wanted else None


def of_draws(x: Tensor, drawn: Sequence[Tensor]) -> dict[str, Tensor]:
    """Bias and variance of k draws of x's cast, in sums of squares over the elements.

    The squared distance of the draws' mean from x contains 1/k of their variance, which is subtracted.
    """
    errors = [y.float() - x.float() for y in drawn]
    mean = torch.stack(errors).mean(dim=0)
    variance = sum(_sum((e - mean).square_()) for e in errors) / (len(errors) - 1)
    assert isinstance(variance, Tensor)
    bias = _sum(mean * mean) - variance / len(errors)
    return {"drawn_xx": _sum(x.float() ** 2), "drawn_bias": bias, "drawn_variance": variance}


def numbers(sums: Sequence[float], largest: float) -> dict[str, float]:
    """The statistics that a vector of sums [LENGTH] has something of, by the names of metrics rows;
    ``largest``: the greatest |x|."""
    s = {name: sums[index] for name, index in AT.items()}
    found: dict[str, float] = {}
    if s["elements"] and s["xx"]:
        found["sqnr_db"] = 10 * math.log10(s["xx"] / s["ee"]) if s["ee"] else math.inf
        if s["yy"]:
            found["cosine"] = s["xy"] / math.sqrt(s["xx"] * s["yy"])
        found["underflow"] = s["underflow"] / s["nonzero"] if s["nonzero"] else 0.0
        found["saturation"] = s["saturated"] / s["elements"]
        found["inexact"] = s["inexact"] / s["elements"]
        found["kurtosis"] = s["elements"] * s["xxxx"] / s["xx"] ** 2
        found["crest"] = largest / math.sqrt(s["xx"] / s["elements"])
    if s["blocks"]:
        mean = s["log_amax"] / s["blocks"]
        found["amax_spread"] = math.sqrt(max(0.0, s["log_amax2"] / s["blocks"] - mean**2))
    if s["drawn_xx"]:
        found["draw_bias"] = math.sqrt(max(0.0, s["drawn_bias"]) / s["drawn_xx"])
        found["draw_deviation"] = math.sqrt(s["drawn_variance"] / s["drawn_xx"])
    if s["gradient"]:
        noise = math.sqrt(3 * s["noise"])
        found["gradient_to_noise"] = math.sqrt(s["gradient"]) / noise if noise else math.inf
    if s["weights"]:
        found["oscillation"] = s["oscillating"] / s["weights"]
    return found


def scale_shares(sums: Sequence[float]) -> dict[str, float]:
    """Share of blocks by the exponent of their scale, "zero" for scales of 0; empty octaves left out."""
    counts = sums[len(SUMS) :]
    total = sum(counts)
    return {
        "zero" if index == 0 else str(index + LOWEST): count / total
        for index, count in enumerate(counts)
        if count
    }


def _saturated(x: Tensor, scales: BlockScales, spec: QuantSpec) -> Tensor:
    """As ``numerics.saturation_fraction`` counts them, with the scales made once."""
    scaled = block_view(x, spec.block_shape((x.shape[0], x.shape[1]))) * spread(scales.encode)
    clipped = scaled.abs_() > spec.row.element.max
    return _sum(clipped & spread(decoded_scales(scales.stored) != 0))


def octaves(stored: Tensor) -> Tensor:
    """Scales by floor(log2), float64 [OCTAVES]; the first one holds the zeros."""
    values = decoded_scales(stored).flatten()
    exponent = torch.floor(torch.log2(values.clamp(min=1e-45)))
    index = torch.where(values == 0, 0, (exponent - LOWEST).clamp(1, OCTAVES - 1).nan_to_num(1.0))
    found = torch.zeros(OCTAVES, dtype=torch.float64, device=stored.device)
    return found.index_add_(0, index.long(), torch.ones_like(values, dtype=torch.float64))


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _count(x: Tensor) -> Tensor:
    return torch.full((), float(x.numel()), dtype=torch.float64, device=x.device)
