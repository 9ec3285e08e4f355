"""Quantize one matrix: to packed codes (``quantize``), or to what they stand for (``emulate``).

Both run the same steps: scales of the blocks, element = round(x * encode), then either codes or
element * block scale. So ``emulate`` equals ``quantize(...).dequantize()`` bit for bit, by
construction, and costs no packing. It is the fast path of the reference backend: in every training
step on a CPU it handles each operand of each GEMM, in cache-sized slices and in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4pretrain.numerics.blocks import block_view, row_slices, spread
from fp4pretrain.numerics.formats import QuantSpec
from fp4pretrain.numerics.noise import Noise, noise_bytes, noise_words
from fp4pretrain.numerics.rounding import decode_e2m1, encode_e2m1, round_to_grid_
from fp4pretrain.numerics.scaling import NVFP4_RULES, BlockScales, operand_scales


@dataclass
class QuantizedTensor:
    """A matrix [rows, cols] in a low-precision format, its contraction axis last.

    Attributes:
        codes: uint8 [rows, cols / 2], the even element in the low nibble (nvfp4, mxfp4);
            float8 [rows, cols] (mxfp8, fp8); bfloat16 [rows, cols] (bf16).
        scales: one a block, [row blocks, col blocks]: float8_e4m3fn (nvfp4), float8_e8m0fnu (mx),
            fp32 factors of dequantization (fp8); None (bf16).
        amax: fp32 scalar the tensor scale was made from (nvfp4, per-tensor fp8), else None.
        spec: how it was cast.
        shape: (rows, cols).
    """

    codes: Tensor
    scales: Tensor | None
    amax: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]

    def alpha(self) -> Tensor:
        """The fp32 scalar that belongs on a GEMM's result: amax / 2688 for nvfp4."""
        one = torch.ones((), device=self.codes.device)
        if self.scales is not None and self.spec.block == "tensor":
            return self.scales.reshape(())
        if self.amax is not None:
            return self.amax / (one * NVFP4_RULES[self.spec.scale].tensor_max)
        return one * (4.0 / 3.0) if self.spec.scale == "unbiased" else one

    def values(self) -> Tensor:
        """Element times block scale, fp32 [rows, cols]; exact in bfloat16 but for blocked fp8."""
        packed = self.spec.row.element.packed
        values = decode_e2m1(self.codes) if packed else self.codes.to(torch.float32)
        if self.scales is None or self.spec.block == "tensor":
            return values
        block = self.spec.block_shape(self.shape)
        block_view(values, block).mul_(spread(self.scales.to(torch.float32)))
        return values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``values() * alpha()`` computed in fp32, [rows, cols] in ``dtype``."""
        return (self.values() * self.alpha()).to(dtype)


@torch.no_grad()
def quantize(
    x: Tensor, spec: QuantSpec, *, noise: Noise | None = None, amax: Tensor | None = None
) -> QuantizedTensor:
    """Cast ``x`` as ``spec`` says.

    Args:
        x: [rows, cols], a float dtype; blocks lie along cols, the contraction axis.
        noise: the draw for stochastic rounding; not used by nearest rounding.
        amax: fp32 scalar to use as the tensor's amax (tensor parallelism); default x's own.

    Raises:
        UserError: where the blocks do not divide x.
        ValueError: for stochastic rounding without noise, or an x that is not a matrix.
    """
    x, shape = _checked(x, spec, noise)
    element = spec.row.element
    if spec.row.scale_type == "none":
        return QuantizedTensor(x.to(element.dtype), None, None, spec, shape)
    scales = operand_scales(x, spec, amax)
    elements = _round_scaled(x, spec, scales, noise, dequantize=False)
    if spec.row.scale_type != "fp32":  # the scale alone carries the NaN: codes are 0
        elements.nan_to_num_(nan=0.0)
        block_view(elements, spec.block_shape(shape)).masked_fill_(spread(scales.encode.isnan()), 0)
    codes = encode_e2m1(elements) if element.packed else elements.to(element.dtype)
    return QuantizedTensor(codes, scales.stored, scales.amax, spec, shape)


@torch.no_grad()
def emulate(
    x: Tensor, spec: QuantSpec, *, noise: Noise | None = None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(values, alpha)`` with ``values * alpha == quantize(...).dequantize()`` bit for bit.

    Arguments and errors are those of ``quantize``.

    Returns:
        values: fp32 [rows, cols], element times block scale. Exact in bfloat16 for nvfp4, mxfp4,
            mxfp8, per-tensor fp8 and bf16, so a bfloat16 GEMM may carry them.
        alpha: fp32 scalar for the GEMM's result.
    """
    x, _ = _checked(x, spec, noise)
    if spec.row.scale_type == "none":
        return x.to(torch.bfloat16).to(torch.float32), torch.ones((), device=x.device)
    scales = operand_scales(x, spec, amax)
    return _round_scaled(x, spec, scales, noise, dequantize=True), scales.alpha


def _checked(x: Tensor, spec: QuantSpec, noise: Noise | None) -> tuple[Tensor, tuple[int, int]]:
    """The operand, row-major and at most fp32, and its shape."""
    if x.dim() != 2:
        raise ValueError(f"quantize takes a matrix [rows, cols], got {list(x.shape)}")
    if spec.stochastic and noise is None:
        raise ValueError(f"{spec} needs noise: pass a Noise with its key")
    shape = (x.shape[0], x.shape[1])
    spec.block_shape(shape)
    return (x.to(torch.float32) if x.dtype == torch.float64 else x).contiguous(), shape


def _round_scaled(
    x: Tensor, spec: QuantSpec, scales: BlockScales, noise: Noise | None, *, dequantize: bool
) -> Tensor:
    """Rounded elements, fp32 [rows, cols]; times their block scale where ``dequantize``."""
    shape = (x.shape[0], x.shape[1])
    block_rows, block_cols = spec.block_shape(shape)
    encode, decode = scales.encode, scales.decode if dequantize else None
    if encode.shape[0] == 1:  # one block spans the rows: slices may cut it
        block_rows, encode = 1, encode.expand(shape[0], -1)
        decode = None if decode is None else decode.expand(shape[0], -1)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    x_b, out_b = (block_view(t, (block_rows, block_cols)) for t in (x, out))
    bits_b = scratch = None
    if noise is not None and spec.stochastic:
        bits_b = block_view(_noise_bits(spec, noise, shape, x.device), (block_rows, block_cols))
    for rows in row_slices(shape, block_rows, x.device):
        blocks = slice(rows.start // block_rows, rows.stop // block_rows)
        y_b = out_b[blocks]
        if scratch is None or scratch.shape != y_b.shape:
            scratch = torch.empty_like(y_b)
        torch.mul(x_b[blocks], spread(encode[blocks]), out=y_b)
        round_to_grid_(
            y_b,
            spec.row.element,
            ties=spec.ties,
            noise=None if bits_b is None else bits_b[blocks],
            scratch=scratch,
        )
        if decode is not None:
            y_b.mul_(spread(decode[blocks]))
    return out


def _noise_bits(
    spec: QuantSpec, noise: Noise, shape: tuple[int, int], device: torch.device
) -> Tensor:
    draw = noise_bytes if spec.rounding == "stochastic" else noise_words
    return draw(noise, shape, device)
