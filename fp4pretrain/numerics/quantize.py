"""Quantize one matrix: to packed codes (``quantize``), or to what they stand for (``emulate``).

Both run the same steps: scales of the blocks, element = round(x * encode), then either codes or
element * block scale. So ``emulate`` equals ``quantize(...).dequantize()`` bit for bit, by
construction, and costs no packing. It is the fast path of the reference backend: in every training
step on a CPU it handles each operand of each GEMM, in cache-sized slices and in place.

A matrix that blocks do not divide is cast as if zeros were appended up to whole blocks. Zeros change
no scale, so every element is cast as it would be in the longer matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.numerics.blocks import block_view, over_blocks, row_slices, spread
from fp4pretrain.numerics.formats import BF16, E4M3
from fp4pretrain.numerics.noise import Noise, noise_bytes, noise_words
from fp4pretrain.numerics.rounding import decode, encode, round_to_grid_
from fp4pretrain.numerics.scaling import (
    BlockScales,
    capped_rule,
    decoded_scales,
    mx_stretch,
    operand_scales,
    stored_scales,
    tree_sum,
)
from fp4pretrain.numerics.spec import QuantSpec

_EDEN_GROUP = 128


@dataclass
class QuantizedTensor:
    """A matrix [rows, cols] in a low-precision format, its contraction axis last.

    ``padded`` below is cols up to whole blocks; elements behind cols are zeros.

    Attributes:
        codes: uint8 [rows, padded / 2], the even element in the low nibble (4 bits); uint8
            [rows, padded] (6 bits); float8 [rows, padded] (mxfp8, fp8); bfloat16 [rows, cols] (bf16).
        scales: of the innermost level, one a block, [row blocks, col blocks]: float8_e4m3fn (nvfp4),
            uint8 (UE5M3), float8_e8m0fnu (mx), fp32 factors of dequantization (fp8); None (bf16).
        amax: fp32 amax that the outer scale was made from (a scalar for nvfp4 and per-tensor fp8),
            else None.
        spec: how it was cast.
        shape: (rows, cols).
    """

    codes: Tensor
    scales: Tensor | None
    amax: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]

    def alpha(self) -> Tensor:
        """The fp32 factor that belongs on a GEMM's result: a scalar (nvfp4: amax / 2688) or [rows, 1]."""
        one = torch.ones((), device=self.codes.device)
        if self.scales is None:
            return one
        if len(self.spec.row.levels) > 1:
            outer = self._outer_decode()
            if self.spec.amax_span == "block" or not self.codes.numel():
                return one
            if self.spec.amax_span == "tensor":
                return outer
            blocks = self.spec.block_shape(self.shape, 1)
            return over_blocks(outer, blocks, (1, self.shape[1]))[: self.shape[0]]
        if self.spec.amax_span != "block":
            return self.scales.reshape(()) if self.scales.numel() == 1 else self.scales
        return one * mx_stretch(self.spec)[1]

    def values(self) -> Tensor:
        """Elements times the scales that lie on them, fp32 [rows, cols].

        Exact in bfloat16 where ``spec.exact_in_bf16``.
        """
        rows, cols = self.shape
        values = decode(self.codes, self.spec.row.element)
        spans = len(self.spec.row.levels) == 1 and self.spec.amax_span != "block"
        if self.scales is None or spans or not values.numel():
            return values[:, :cols]
        padded = self.spec.padded_shape(self.shape)
        values = F.pad(values, (0, 0, 0, padded[0] - rows))
        block = self.spec.block_shape(padded)
        factors = decoded_scales(self.scales)
        if len(self.spec.row.levels) > 1 and self.spec.amax_span == "block":
            factors = factors * over_blocks(
                self._outer_decode(), self.spec.block_shape(padded, 1), block
            )
        block_view(values, block).mul_(spread(factors))
        return values[:rows, :cols]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``values() * alpha()`` computed in fp32, [rows, cols] in ``dtype``."""
        return (self.values() * self.alpha()).to(dtype)

    def _outer_decode(self) -> Tensor:
        assert self.amax is not None
        return self.amax / torch.tensor(capped_rule(self.spec).outer_max, device=self.codes.device)


@torch.no_grad()
def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    noise: Noise | None = None,
    amax: Tensor | None = None,
    group: int = 0,
) -> QuantizedTensor:
    """Cast ``x`` as ``spec`` says.

    Args:
        x: [rows, cols], a float dtype; blocks lie along cols, the contraction axis. Either may be 0.
        noise: the draw for stochastic rounding; not used by nearest rounding.
        amax: fp32 amaxes to use in place of x's own where they span the contraction axis (tensor
            parallelism): a scalar for one scale a tensor, [rows] for one a row.
        group: elements along cols whose scales ``rounding: eden`` corrects alike: the size of the
            rotation that x went through, 128 if 0. ``source`` and ``split`` are for the caller.

    Raises:
        ValueError: for stochastic rounding without noise, or an x that is not a matrix.
    """
    x, shape = _checked(x, spec, noise)
    element = spec.row.element
    if not spec.quantized:
        return QuantizedTensor(x.to(element.dtype), None, None, spec, shape)
    x, amax = _padded(x, spec, amax)
    if not x.numel():
        return _empty(x, spec, shape, amax)
    scales = operand_scales(x, spec, amax)
    elements = _round_scaled(x, spec, scales, noise, dequantize=False)
    if spec.rounding_row.scales:
        scales = _corrected(x, elements, spec, scales, noise, group or _EDEN_GROUP)
    if spec.row.scale_type != "fp32":  # the scale alone carries the NaN: codes are 0
        elements.nan_to_num_(nan=0.0)
        block = spec.block_shape((x.shape[0], x.shape[1]))
        block_view(elements, block).masked_fill_(spread(scales.encode.isnan()), 0)
    codes = encode(elements, element)[: shape[0]]
    stored = scales.stored
    if spec.amax_span == "row" and len(spec.row.levels) == 1:
        stored = stored[: shape[0]]
    return QuantizedTensor(codes, stored, scales.amax, spec, shape)


@torch.no_grad()
def emulate(
    x: Tensor,
    spec: QuantSpec,
    *,
    noise: Noise | None = None,
    amax: Tensor | None = None,
    group: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(values, alpha)`` with ``values * alpha == quantize(...).dequantize()`` bit for bit.

    Arguments and errors are those of ``quantize``.

    Returns:
        values: fp32 [rows, cols], element times block scale. Exact in bfloat16 where
            ``spec.exact_in_bf16``, so a bfloat16 GEMM may carry them.
        alpha: fp32 for the GEMM's result: a scalar, or [rows, 1].
    """
    x, (rows, cols) = _checked(x, spec, noise)
    if not spec.quantized:
        return x.to(BF16.dtype).to(torch.float32), torch.ones((), device=x.device)
    x, amax = _padded(x, spec, amax)
    if not x.numel():
        return torch.zeros((rows, cols), device=x.device), torch.ones((), device=x.device)
    scales = operand_scales(x, spec, amax)
    corrects = spec.rounding_row.scales
    values = _round_scaled(x, spec, scales, noise, dequantize=not corrects)
    if corrects:
        scales = _corrected(x, values, spec, scales, noise, group or _EDEN_GROUP)
        assert scales.decode is not None
        block_view(values, spec.block_shape((x.shape[0], x.shape[1]))).mul_(spread(scales.decode))
    alpha = scales.alpha if scales.alpha.dim() == 0 else scales.alpha[:rows]
    return values[:rows, :cols], alpha


def _corrected(
    x: Tensor,
    elements: Tensor,
    spec: QuantSpec,
    scales: BlockScales,
    noise: Noise | None,
    group: int,
) -> BlockScales:
    """MS-EDEN's block scales (arXiv:2601.22813): times <x, x> / <x, q>, rounded by noise.

    x and q are one group of ``group`` neighbours before and after they were rounded, both in units of
    their scales; the sums are trees of neighbours. Over random rotations the corrected cast is unbiased. The
    noise of a block is that of its first element; stochastic rounding onto E4M3 keeps the correction's mean.
    """
    assert noise is not None
    assert scales.decode is not None
    rows, cols = x.shape
    block_cols = spec.block_shape((rows, cols))[1]
    scaled = (block_view(x, (1, block_cols)) * spread(scales.encode)).reshape(rows, cols)
    short = -cols % group
    x_g, q_g = (F.pad(t, (0, short)).view(rows, -1, group) for t in (scaled, elements))
    # each block's part of the sums counts in the units of the group, not of the block
    weight = F.pad(scales.decode, (0, short // block_cols)).square()
    weight_g = weight.repeat_interleave(block_cols, 1).view(rows, -1, group)
    x_g = torch.where(weight_g == 0, 0.0, x_g)  # a block whose scale underflowed counts as zeros
    norms = tree_sum(x_g.square() * weight_g)
    products = tree_sum(x_g * q_g * weight_g)
    factor = torch.where(products == 0, 1.0, norms / products)
    factor_b = factor.repeat_interleave(group // block_cols, 1)[:, : cols // block_cols]
    decode = (scales.decode * factor_b).clamp(max=E4M3.max)
    bits = noise_bytes(noise, (rows, cols), x.device)[:, ::block_cols]
    round_to_grid_(decode, E4M3, ties="even", noise=bits)
    stored = stored_scales(decode, "e4m3")
    return replace(scales, stored=stored, decode=decoded_scales(stored))


def _checked(x: Tensor, spec: QuantSpec, noise: Noise | None) -> tuple[Tensor, tuple[int, int]]:
    """The operand, row-major and at most fp32, and its shape."""
    if x.dim() != 2:
        raise ValueError(f"quantize takes a matrix [rows, cols], got {list(x.shape)}")
    if spec.stochastic and noise is None:
        raise ValueError(f"{spec} needs noise: pass a Noise with its key")
    x = x.to(torch.float32) if x.dtype == torch.float64 else x
    return x.contiguous(), (x.shape[0], x.shape[1])


def _padded(x: Tensor, spec: QuantSpec, amax: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x with zeros appended up to whole blocks; amaxes a row, if given, with zeros for the new rows."""
    rows, cols = spec.padded_shape((x.shape[0], x.shape[1]))
    more = rows - x.shape[0]
    if amax is not None and amax.dim() and more:
        amax = F.pad(amax, (0, more))
    if more or cols != x.shape[1]:
        x = F.pad(x, (0, cols - x.shape[1], 0, more))
    return x, amax


def _empty(
    x: Tensor, spec: QuantSpec, shape: tuple[int, int], amax: Tensor | None
) -> QuantizedTensor:
    """The cast of a matrix without elements."""
    one = torch.ones((1, 1), device=x.device)
    codes = encode(x[: shape[0]], spec.row.element)
    if amax is None and spec.amax_span == "tensor":
        amax = torch.zeros((), device=x.device)
    elif len(spec.row.levels) > 1 and spec.amax_span != "tensor":
        outer = [max(n, 1) for n in spec.block_shape((x.shape[0], x.shape[1]), 1)]
        amax = torch.zeros(x.shape[0] // outer[0], x.shape[1] // outer[1], device=x.device)
    if spec.amax_span != "block" and len(spec.row.levels) == 1:
        stored = one if spec.amax_span == "tensor" else one.expand(shape[0], 1)
        return QuantizedTensor(codes, stored, amax, spec, shape)
    scales = {
        "e4m3": torch.float8_e4m3fn,
        "ue5m3": torch.uint8,
        "e8m0": torch.float8_e8m0fnu,
        "fp32": torch.float32,
    }
    block = [max(n, 1) for n in spec.block_shape((x.shape[0], x.shape[1]))]
    stored = torch.ones((x.shape[0] // block[0], x.shape[1] // block[1]), device=x.device)
    return QuantizedTensor(codes, stored.to(scales[spec.row.scale_type]), amax, spec, shape)


def _round_scaled(
    x: Tensor, spec: QuantSpec, scales: BlockScales, noise: Noise | None, *, dequantize: bool
) -> Tensor:
    """Rounded elements, fp32 [rows, cols]; times their block scale where ``dequantize``."""
    shape = (x.shape[0], x.shape[1])
    block_rows, block_cols = spec.block_shape(shape)
    factors, decode_b = scales.encode, scales.decode if dequantize else None
    if factors.shape[0] == 1:  # one block spans the rows: slices may cut it
        block_rows, factors = 1, factors.expand(shape[0], -1)
        decode_b = None if decode_b is None else decode_b.expand(shape[0], -1)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    x_b, out_b = (block_view(t, (block_rows, block_cols)) for t in (x, out))
    bits_b = scratch = None
    if noise is not None and spec.stochastic and not spec.rounding_row.scales:
        bits_b = block_view(_noise_bits(spec, noise, shape, x.device), (block_rows, block_cols))
    for rows in row_slices(shape, block_rows, x.device):
        blocks = slice(rows.start // block_rows, rows.stop // block_rows)
        y_b = out_b[blocks]
        if scratch is None or scratch.shape != y_b.shape:
            scratch = torch.empty_like(y_b)
        torch.mul(x_b[blocks], spread(factors[blocks]), out=y_b)
        round_to_grid_(
            y_b,
            spec.row.element,
            ties=spec.ties,
            noise=None if bits_b is None else bits_b[blocks],
            scratch=scratch,
        )
        if decode_b is not None:
            y_b.mul_(spread(decode_b[blocks]))
    return out


def _noise_bits(
    spec: QuantSpec, noise: Noise, shape: tuple[int, int], device: torch.device
) -> Tensor:
    draw = noise_bytes if spec.rounding_row.noise_bits == 8 else noise_words
    return draw(noise, shape, device)
