"""Scale rules: from the largest magnitudes of blocks to the factors their elements are divided by.

Every line below keeps the order of its fp32 operations, because kernels reproduce scales bit for
bit: ``S_enc * fp32(1/6)`` is rounded before it meets the block's amax. Divisions are between
tensors, never by a Python number: PyTorch turns those into a product with the reciprocal, which
rounds twice.

Not-a-number policy: a block whose amax is Inf or NaN (or, where an outer scale exists, whose outer
block's amax is) gets the scale NaN, so a non-finite input never becomes a finite number.

Sources: Transformer Engine (core_nvfp4.cuh, reference_nvfp4.py); OCP MX v1.0; torchao; AMD (ROCm
TE, AITER) for ``even``; arXiv:2506.08027 for ``rceil``; arXiv:2502.20586 for mxfp4's ``unbiased``;
arXiv:2601.22813 for nvfp4's and for ``eden``; arXiv:2512.02010 for ``four_over_six``; arXiv:2610.00053
for ``full_grid`` and ``full_grid_adaptive``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4pretrain.numerics.blocks import (
    block_amax,
    block_view,
    outer_amax,
    over_blocks,
    row_slices,
    spread,
    tensor_amax,
)
from fp4pretrain.numerics.formats import E4M3, UE5M3, Element
from fp4pretrain.numerics.rounding import round_to_grid_
from fp4pretrain.numerics.spec import QuantSpec

FLT_MAX = torch.finfo(torch.float32).max
# arXiv:2610.00053: a tile whose largest element is under this share of its scale takes half the scale.
_ADAPTIVE_BELOW = 0.87
# MS-EDEN's search for the least error leaves elements up to 1/0.93 of the largest to clip.
_EDEN_SHRINK = 0.93


@dataclass(frozen=True)
class CappedRule:
    """A rule of rounded block scales: an outer amax becomes ``element_max`` under scale ``cap``."""

    cap: float
    element_max: float

    @property
    def outer_max(self) -> float:
        """The scaled value of the outer block's amax: 2688 for NVFP4's default."""
        return self.cap * self.element_max


def capped_rule(spec: QuantSpec) -> CappedRule:
    """The numbers of a rule of rounded block scales, from the largest values of element and scale.

    Cap 256: scaling a block to 4 in place of 6 multiplies its scale by 1.5, and 384 is an E4M3
    number. ``unbiased``: three mantissa bits round a scale down by at most 16/17, so even then
    nothing clips. ``eden``: what clips is made good by the correction of the scales.
    """
    largest, cap = spec.row.element.max, _scale_element(spec).max
    return {
        "default": CappedRule(cap, largest),
        "unbiased": CappedRule(cap, largest * 16.0 / 17.0),
        "cap256": CappedRule(256.0, largest),
        "four_over_six": CappedRule(256.0, largest),
        "eden": CappedRule(256.0, largest * 16.0 / (17.0 * _EDEN_SHRINK)),
    }[spec.scale]


def _scale_element(spec: QuantSpec) -> Element:
    """The grid that block scales are rounded to."""
    return {"e4m3": E4M3, "ue5m3": UE5M3}[spec.row.scale_type]


def stored_scales(scale: Tensor, type_: str) -> Tensor:
    """Non-negative fp32 scales rounded to nearest as they are kept: float8_e4m3fn, or UE5M3's byte.

    UE5M3 (arXiv:2609.02846): five bits of exponent (bias 15), three of mantissa, no sign; code 255 is
    NaN here, and a code of 0 is read as the scale 1.
    """
    if type_ == "e4m3":
        return scale.clamp(max=E4M3.max).to(torch.float8_e4m3fn)
    rounded = round_to_grid_(scale.clone(), UE5M3, ties="even")
    normal = ((rounded.view(torch.int32) >> 20) - ((127 - 15) << 3)).clamp(min=0)
    subnormal = (rounded * 2.0**17).to(torch.int32)
    code = torch.where(rounded < 2.0**UE5M3.emin, subnormal, normal)
    return torch.where(rounded.isnan(), 255, code).to(torch.uint8)


def decoded_scales(stored: Tensor) -> Tensor:
    """fp32 values of scales as they are kept; see ``stored_scales``."""
    if stored.dtype != torch.uint8:
        return stored.to(torch.float32)
    code = stored.to(torch.int32)
    normal = ((code + ((127 - 15) << 3)) << 20).view(torch.float32)
    value = torch.where(code < 8, code.to(torch.float32) * 2.0**-17, normal)
    value = torch.where(code == 0, 1.0, value)
    return torch.where(code == 255, torch.nan, value)


@dataclass(frozen=True)
class BlockScales:
    """The scales of one operand, one entry a block of the innermost level, [row blocks, col blocks].

    Attributes:
        stored: what is kept: float8_e4m3fn, float8_e8m0fnu, uint8 (UE5M3) or fp32.
        encode: fp32 factor an element is multiplied with before it is rounded.
        decode: fp32 factor a rounded element is multiplied with; None where alpha says it all.
        alpha: fp32 factor that remains for the GEMM's result: a scalar, or [rows, 1].
        amax: fp32 amaxes that the outermost scale was made from: a scalar, or one an outer block
            [row blocks, col blocks]; None where every innermost block stands alone.
    """

    stored: Tensor
    encode: Tensor
    decode: Tensor | None
    alpha: Tensor
    amax: Tensor | None


def operand_scales(x: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> BlockScales:
    """The scales of ``x`` [rows, cols], whole blocks, by the format's type of innermost scale.

    Args:
        amax: the outermost amaxes where the caller knows them (tensor parallelism): a scalar for a
            tensor, [rows] for rows. They replace x's own and are ignored where blocks stand alone.
    """
    return _SCALES[spec.row.scale_type](x, spec, amax)


def spanning_amax(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """The amaxes that reach over the whole contraction axis of x [rows, cols], in fp32.

    A scalar for one scale a tensor, [rows] for one a row, None for blocks that stand alone. These are
    what tensor parallelism reduces (maximum) where that axis, or the tensor, is sharded.
    """
    if spec.amax_span == "block":
        return None
    if spec.amax_span == "tensor":
        return tensor_amax(x)
    if not x.numel():
        return torch.zeros(x.shape[0], device=x.device)
    return block_amax(x, (1, x.shape[1])).flatten()


def _capped_scales(x: Tensor, spec: QuantSpec, amax: Tensor | None) -> BlockScales:
    """E4M3 or UE5M3 scales of blocks under FP32 scales of outer blocks (NVFP4: of the tensor)."""
    rule = capped_rule(spec)
    shape = (x.shape[0], x.shape[1])
    block, outer = spec.block_shape(shape), spec.block_shape(shape, 1)
    amax_b = block_amax(x, block)
    amax = _outer_amax_of(amax_b, spec, shape, amax)
    encode_outer = over_blocks(_encode(amax, rule.outer_max), outer, block)
    if spec.scale == "four_over_six":
        scale_b = _four_over_six(x, amax_b, encode_outer, spec, block)
    else:
        inverse_max = torch.tensor(1.0 / rule.element_max, device=x.device)
        scale_b = amax_b * (encode_outer * inverse_max)
    stored = stored_scales(torch.where(_finite(amax_b), scale_b, torch.nan), spec.row.scale_type)
    decode = decoded_scales(stored)
    encode = _capped_encode(decode, encode_outer)
    decode_outer = amax / torch.tensor(rule.outer_max, device=x.device)
    if spec.amax_span == "block":  # the outer scale changes along the contraction axis
        decode = decode * over_blocks(decode_outer, outer, block)
        decode_outer = torch.ones((), device=x.device)
    return BlockScales(stored, encode, decode, _per_row(decode_outer, outer, shape), amax)


def _outer_amax_of(
    amax_b: Tensor, spec: QuantSpec, shape: tuple[int, int], given: Tensor | None
) -> Tensor:
    """Amaxes of the outer blocks: a scalar for the tensor, else [row blocks, col blocks]."""
    if spec.amax_span == "tensor":
        return tensor_amax(amax_b) if given is None else given.to(torch.float32).reshape(())
    block, outer = spec.block_shape(shape), spec.block_shape(shape, 1)
    if given is not None and spec.amax_span == "row":
        amax_b = given.to(torch.float32)[:, None]
        block = (1, shape[1])
    return outer_amax(amax_b, outer, block)


def _per_row(factor: Tensor, outer: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """A factor for the GEMM's result: the scalar, or one a row [rows, 1]."""
    return factor if factor.dim() == 0 else over_blocks(factor, outer, (1, shape[1]))


def _encode(amax: Tensor, largest: float) -> Tensor:
    """S_enc = min(largest / amax, FLT_MAX); 1 where amax is 0, NaN where it is not finite."""
    encode = (torch.tensor(largest, device=amax.device) / amax).clamp(max=FLT_MAX)
    return torch.where(_finite(amax), torch.where(amax == 0, 1.0, encode), torch.nan)


def _finite(amax: Tensor) -> Tensor:
    return amax < torch.inf  # false for NaN too


def _capped_encode(decode: Tensor, encode_outer: Tensor) -> Tensor:
    """min(1 / (fp32(s_b) * S_dec), FLT_MAX): FLT_MAX where the block scale is 0."""
    return _inverse(decode * _inverse(encode_outer)).clamp(max=FLT_MAX)


def _inverse(x: Tensor) -> Tensor:
    return torch.ones((), device=x.device) / x


def _four_over_six(
    x: Tensor, amax_b: Tensor, encode_outer: Tensor, spec: QuantSpec, block: tuple[int, int]
) -> Tensor:
    """The E4M3 scale (as fp32), block to 6 or to 4, of smaller squared error; a tie goes to 6.

    The error of a block is sum((q * s_b - x * S_enc)^2) in fp32, summed as a tree of neighbours:
    ((e0 + e1) + (e2 + e3)) + ..., along the columns first, then (2d) along the rows.
    """
    scale = amax_b / torch.tensor(6.0, device=x.device) * encode_outer
    scale_6, scale_4 = (
        decoded_scales(stored_scales(wanted, "e4m3")) for wanted in (scale, scale * 1.5)
    )
    error_6, error_4 = (
        _squared_error(x, candidate, encode_outer, spec, block) for candidate in (scale_6, scale_4)
    )
    return torch.where(error_4 < error_6, scale_4, scale_6)


def _squared_error(
    x: Tensor, decode: Tensor, encode_outer: Tensor, spec: QuantSpec, block: tuple[int, int]
) -> Tensor:
    encode = _capped_encode(decode, encode_outer)
    outer_b = encode_outer.expand(decode.shape)
    errors = []
    for rows in row_slices((x.shape[0], x.shape[1]), block[0], x.device):
        blocks = slice(rows.start // block[0], rows.stop // block[0])
        x_b = block_view(x[rows], block).to(torch.float32)
        y_b = (x_b * spread(encode[blocks])).contiguous()
        round_to_grid_(y_b, spec.row.element, ties=spec.ties)
        scaled = x_b * spread(outer_b[blocks])
        error = y_b.mul_(spread(decode[blocks])).sub_(scaled).square_()
        errors.append(tree_sum(tree_sum(error).transpose(1, 2)))
    return torch.cat(errors)


def tree_sum(x: Tensor) -> Tensor:
    """The sum over the last axis (a power of two long), neighbours first."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def _mx_scales(x: Tensor, spec: QuantSpec, amax: Tensor | None) -> BlockScales:
    del amax  # every block stands alone
    amax_b = block_amax(x, spec.block_shape((x.shape[0], x.shape[1])))
    stored = mx_scale_bytes(amax_b, spec.row.element, spec.scale).view(torch.float8_e8m0fnu)
    decode = stored.to(torch.float32)
    stretch, alpha = mx_stretch(spec)
    return BlockScales(
        stored=stored,
        encode=(_inverse(decode) * stretch).clamp(max=FLT_MAX),
        decode=decode,
        alpha=torch.tensor(alpha, device=x.device),
        amax=None,
    )


def mx_stretch(spec: QuantSpec) -> tuple[float, float]:
    """What a rule multiplies scaled elements with, and the inverse that the GEMM's result gets.

    ``unbiased``: 3/4, so that nothing clips under the floor exponent. ``full_grid``: 6, so that a
    power of two under its own scale lands on E2M1's largest element.
    """
    if spec.scale == "unbiased":
        return 0.75, 4.0 / 3.0
    if spec.scale.startswith("full_grid"):
        return spec.row.element.max, 1.0 / spec.row.element.max
    return 1.0, 1.0


def mx_scale_bytes(amax_b: Tensor, element: Element, rule: str) -> Tensor:
    """E8M0 bytes of fp32 block amaxes; a zero block gets 0, a non-finite one 255.

    Exponents come from the fp32 bits. A subnormal amax has exponent field 0, which is right for
    every rule: its true exponent lies below -126 and is clamped to -127 (byte 0) anyway.
    """
    if rule == "rceil":
        byte = e8m0_round_up(amax_b * torch.tensor(1.0 / element.max, device=amax_b.device))
    elif rule in ("full_grid", "full_grid_adaptive"):
        byte = e8m0_round_up(amax_b)
        if rule == "full_grid_adaptive":  # half the scale where the grid's upper end would be empty
            scale = byte.clamp(max=254).to(torch.uint8).view(torch.float8_e8m0fnu).float()
            byte = byte - ((amax_b / scale < _ADAPTIVE_BELOW) & (byte > 0)).to(byte.dtype)
    else:
        bits = amax_b.view(torch.int32)
        if rule == "ceil":
            bits = bits + 0x7FFFFF
        elif rule == "even":
            bits = bits + (1 << (22 - element.mantissa_bits))  # 0x200000 for E2M1
        byte = ((bits >> 23) - element.emax).clamp(0, 254)
    return torch.where(_finite(amax_b), byte, 255).to(torch.uint8)


def e8m0_round_up(value: Tensor) -> Tensor:
    """int32 E8M0 bytes of non-negative fp32, rounded up (``cvt.rp.ue8m0x2``); Inf and NaN are 255.

    Byte b is 2**(b - 127), so byte 0 is 2**-127, a subnormal of fp32: values up to it round to 0.
    """
    bits = value.view(torch.int32)
    field, mantissa = bits >> 23, bits & 0x7FFFFF
    up = torch.where(field == 0, mantissa > 0x400000, mantissa > 0)
    return torch.where(_finite(value), field + up, 255)


def _fp32_scales(x: Tensor, spec: QuantSpec, amax: Tensor | None) -> BlockScales:
    """Current scaling: S = max / amax, per tensor, row or block; what is stored is 1 / S."""
    shape = (x.shape[0], x.shape[1])
    spans = spec.amax_span != "block"
    if not spans:
        amax_b = block_amax(x, spec.block_shape(shape))
    else:
        amax = spanning_amax(x, spec) if amax is None else amax.to(torch.float32)
        assert amax is not None
        amax_b = amax.reshape(-1, 1)
    encode = _encode(amax_b, spec.row.element.max)
    if spec.scale == "pow2":
        encode = (encode.view(torch.int32) & 0x7F800000).view(torch.float32)
        encode = torch.where(_finite(amax_b), encode, torch.nan)
    stored = _inverse(encode)
    alpha = torch.ones((), device=x.device)
    if spans:
        alpha = stored.reshape(()) if spec.amax_span == "tensor" else stored
    return BlockScales(
        stored=stored,
        encode=encode,
        decode=None if spans else stored,
        alpha=alpha,
        amax=amax.reshape(()) if spec.amax_span == "tensor" and amax is not None else None,
    )


_SCALES = {
    "e4m3": _capped_scales,
    "ue5m3": _capped_scales,
    "e8m0": _mx_scales,
    "fp32": _fp32_scales,
}
