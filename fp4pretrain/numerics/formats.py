"""Which formats exist: element grids, types of scales, and the table that combines them.

A *format* is an element grid under a list of scale levels. Every level shares one scale among a block
of elements; the innermost level comes first. NVFP4 is E2M1 under 1x16 blocks in E4M3 under one FP32
scale a tensor, MXFP4 is E2M1 under 1x32 blocks in E8M0. All formats are rows of ``FORMATS``: nothing
else in this package asks for a format by name, so a new format is a new row.

Where a level's scale goes is decided by its block. A scale that is constant along the contraction
axis (of a tensor, of a row) multiplies the result of the GEMM (``alpha``); any other multiplies the
elements.

Sources: OCP Microscaling Formats (MX) v1.0; NVFP4, arXiv:2509.25149; unbiased MXFP4,
arXiv:2502.20586; Quartet II, arXiv:2601.22813; Four Over Six, arXiv:2512.02010; two FP32 and E4M3
levels in blocks (``nvfp4_double``), TetraJet-v2, arXiv:2510.27527; FP32 scales of row tiles
(``nvfp4_local``) and the full MXFP4 grid, arXiv:2610.00053; UE5M3, arXiv:2609.02846.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

WHOLE = 0  # in a block shape: the block spans the whole axis
Block = tuple[int, int]


@dataclass(frozen=True)
class Element:
    """One grid of values: sign, exponent with subnormals below ``2**emin``, ``mantissa_bits``.

    Neighbouring magnitudes around ``a`` are ``2**(max(floor(log2 a), emin) - mantissa_bits)`` apart.
    A grid of equal steps has ``emin == emax``. ``bits`` a code; codes of 4 bits lie two a byte in
    uint8, codes of 6 bits one a byte in uint8, both as sign and magnitude (the magnitude's index in
    ``magnitudes``); wider codes are values of ``dtype`` itself.
    """

    name: str
    max: float
    emin: int
    emax: int
    mantissa_bits: int
    bits: int
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits == 4

    @property
    def coded(self) -> bool:
        """Whether codes are integers in uint8 rather than values of ``dtype``."""
        return self.bits < 8

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """All magnitudes from 0 to ``max``; the index of one is its code without the sign."""
        found, exponent = [0.0], self.emin
        while found[-1] < self.max:
            if found[-1] >= 2.0 ** (exponent + 1) and exponent < self.emax:
                exponent += 1
            found.append(found[-1] + 2.0 ** (exponent - self.mantissa_bits))
        return tuple(found)


_U8 = torch.uint8
E2M1 = Element("e2m1", max=6.0, emin=0, emax=2, mantissa_bits=1, bits=4, dtype=_U8)
INT4 = Element("int4", max=7.0, emin=2, emax=2, mantissa_bits=2, bits=4, dtype=_U8)
E3M2 = Element("e3m2", max=28.0, emin=-2, emax=4, mantissa_bits=2, bits=6, dtype=_U8)
E2M3 = Element("e2m3", max=7.5, emin=0, emax=2, mantissa_bits=3, bits=6, dtype=_U8)
E4M3 = Element(
    "e4m3", max=448.0, emin=-6, emax=8, mantissa_bits=3, bits=8, dtype=torch.float8_e4m3fn
)
E5M2 = Element(
    "e5m2", max=57344.0, emin=-14, emax=15, mantissa_bits=2, bits=8, dtype=torch.float8_e5m2
)
# Scales only. Of two readings of unsigned E5M3 this one leaves exponent field 31 out (arXiv:2609.02846).
UE5M3 = Element("ue5m3", max=61440.0, emin=-14, emax=15, mantissa_bits=3, bits=8, dtype=_U8)
BF16 = Element(
    "bf16",
    max=3.3895313892515355e38,
    emin=-126,
    emax=127,
    mantissa_bits=7,
    bits=16,
    dtype=torch.bfloat16,
)


@dataclass(frozen=True)
class ScaleLevel:
    """One level of scales: ``type`` (e4m3, ue5m3, e8m0, fp32) and its block by ``QuantSpec.block``.

    A block is (rows, columns), columns along the contraction axis; ``WHOLE`` spans the axis.
    """

    type: str
    blocks: Mapping[str, Block]


@dataclass(frozen=True)
class Format:
    """One row: an element under scale levels, innermost first, and the scale rules it has.

    The first block of the innermost level and the first scale rule are the defaults. ``family`` says
    which formats may meet in one GEMM: those of one family, and BF16.
    """

    name: str
    element: Element
    levels: tuple[ScaleLevel, ...]
    scale_rules: tuple[str, ...]
    family: str

    @property
    def quantized(self) -> bool:
        """Whether a cast changes anything below BF16."""
        return bool(self.levels)

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The innermost level's blocks by name; BF16 has one of a single element."""
        return self.levels[0].blocks if self.levels else {"default": (1, 1)}

    @property
    def scale_type(self) -> str:
        """The type of the innermost scale; none for BF16."""
        return self.levels[0].type if self.levels else "none"

    @property
    def roundings(self) -> tuple[str, ...]:
        """Stochastic rounding is for elements below 8 bits: no published recipe uses it on 8 bits.

        Where noise rounds the scales, they have to be of a type that rounds: E4M3.
        """
        if not self.element.coded:
            return ("nearest",)
        return tuple(
            r.name for r in ROUNDINGS.values() if not r.scales or "eden" in self.scale_rules
        )

    @property
    def ties(self) -> tuple[str, ...]:
        """Public code disagrees on ties below 8 bits only."""
        return TIES if self.element.coded else ("even",)


@dataclass(frozen=True)
class Rounding:
    """How a scaled element meets the grid.

    ``noise_bits``: random bits an element, 0 for none. ``scales``: the elements are rounded to nearest
    and the noise rounds the block scales, after a correction that makes the cast unbiased under a
    random rotation (MS-EDEN, arXiv:2601.22813).
    """

    name: str
    noise_bits: int
    scales: bool = False


ROUNDINGS: Mapping[str, Rounding] = {
    row.name: row
    for row in (
        Rounding("nearest", noise_bits=0),
        Rounding("stochastic", noise_bits=8),
        Rounding("stochastic_full", noise_bits=24),
        Rounding("eden", noise_bits=8, scales=True),
    )
}
TIES = ("even", "away")

_TENSOR: Block = (WHOLE, WHOLE)
_TILE: Block = (128, WHOLE)  # rows of one tile of a GEMM's result
_E4M3_BLOCKS = {"1d": (1, 16), "2d": (16, 16)}


def _outer(block: Block, *names: str) -> ScaleLevel:
    """An FP32 level with the same block under every name of the innermost level's."""
    return ScaleLevel("fp32", dict.fromkeys(names, block))


_NVFP4_LEVELS = (ScaleLevel("e4m3", _E4M3_BLOCKS), _outer(_TENSOR, "1d", "2d"))
_LOCAL_LEVELS = (ScaleLevel("e4m3", _E4M3_BLOCKS), _outer(_TILE, "1d", "2d"))
_DOUBLE_LEVELS = (
    ScaleLevel("e4m3", _E4M3_BLOCKS),
    ScaleLevel("fp32", {"1d": (1, 128), "2d": (128, 128)}),
)
_UE5M3_LEVELS = (
    ScaleLevel("ue5m3", {**_E4M3_BLOCKS, "1d32": (1, 32), "2d32": (32, 32)}),
    _outer(_TENSOR, "1d", "2d", "1d32", "2d32"),
)
_MX_LEVELS = (ScaleLevel("e8m0", {"1d": (1, 32), "2d": (32, 32)}),)
_FP8_LEVELS = (
    ScaleLevel("fp32", {"tensor": _TENSOR, "row": (1, WHOLE), "1d": (1, 128), "2d": (128, 128)}),
)
_NVFP4_RULES = ("default", "unbiased", "cap256", "four_over_six", "eden")
_MX_RULES = ("floor", "ceil", "even", "rceil")
_MXFP4_RULES = (*_MX_RULES, "unbiased", "full_grid", "full_grid_adaptive")
_FP8_RULES = ("default", "pow2")

FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format("nvfp4", E2M1, _NVFP4_LEVELS, _NVFP4_RULES, "nvfp4"),
        Format("nvfp4_local", E2M1, _LOCAL_LEVELS, ("default", "unbiased", "cap256"), "nvfp4"),
        Format("nvfp4_double", E2M1, _DOUBLE_LEVELS, ("default", "unbiased"), "nvfp4"),
        Format("ue5m3", E2M1, _UE5M3_LEVELS, ("default", "unbiased"), "nvfp4"),
        Format("int4", INT4, _NVFP4_LEVELS, ("default", "unbiased"), "int4"),
        Format("mxfp4", E2M1, _MX_LEVELS, _MXFP4_RULES, "mx"),
        Format("mxfp6_e2m3", E2M3, _MX_LEVELS, _MX_RULES, "mx"),
        Format("mxfp6_e3m2", E3M2, _MX_LEVELS, _MX_RULES, "mx"),
        Format("mxfp8", E4M3, _MX_LEVELS, _MX_RULES, "mx"),
        Format("mxfp8_e5m2", E5M2, _MX_LEVELS, _MX_RULES, "mx"),
        Format("fp8_e4m3", E4M3, _FP8_LEVELS, _FP8_RULES, "fp8"),
        Format("fp8_e5m2", E5M2, _FP8_LEVELS, _FP8_RULES, "fp8"),
        Format("bf16", BF16, (), ("default",), "bf16"),
    )
}
