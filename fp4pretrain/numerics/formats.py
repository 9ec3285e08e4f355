"""Which 4- and 8-bit formats exist, and how one operand is cast: two tables and one frozen record.

A *format* is a grid of element values plus a rule for sharing a scale among a block of them. All of
them are rows of ``FORMATS``: nothing else in this package asks for a format by name, so a new
format is a new row. ``QuantSpec`` picks a row and says how to round to it; it is checked when it is
made, so a spec that exists can be computed.

Sources: OCP Microscaling Formats (MX) v1.0; NVFP4, arXiv:2509.25149; unbiased MXFP4,
arXiv:2502.20586; Quartet II, arXiv:2601.22813; Four Over Six, arXiv:2512.02010.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fp4pretrain.errors import UserError

WHOLE = 0  # in a block shape: the block spans the whole axis


@dataclass(frozen=True)
class Element:
    """One element grid: sign, exponent with subnormals below ``2**emin``, ``mantissa_bits``.

    Neighbouring magnitudes around ``a`` are ``2**(max(floor(log2 a), emin) - mantissa_bits)``
    apart. ``dtype`` is what codes are stored in; uint8 stands for two packed 4-bit codes.
    """

    name: str
    max: float
    emin: int
    emax: int
    mantissa_bits: int
    dtype: torch.dtype

    @property
    def packed(self) -> bool:
        """True where two 4-bit codes share a byte (and -0.0 is encoded as +0)."""
        return self.dtype == torch.uint8


E2M1 = Element("e2m1", max=6.0, emin=0, emax=2, mantissa_bits=1, dtype=torch.uint8)
E4M3 = Element("e4m3", max=448.0, emin=-6, emax=8, mantissa_bits=3, dtype=torch.float8_e4m3fn)
E5M2 = Element("e5m2", max=57344.0, emin=-14, emax=15, mantissa_bits=2, dtype=torch.float8_e5m2)
BF16 = Element(
    "bf16", max=3.3895313892515355e38, emin=-126, emax=127, mantissa_bits=7, dtype=torch.bfloat16
)


@dataclass(frozen=True)
class Format:
    """One row: element grid, block shapes by name, the type of the block scale, its scale rules.

    The first block and the first scale rule are the defaults. ``scale_type`` is ``e4m3`` (under an
    fp32 tensor scale), ``e8m0``, ``fp32`` or ``none``.
    """

    name: str
    element: Element
    scale_type: str
    blocks: Mapping[str, tuple[int, int]]
    scale_rules: tuple[str, ...]

    @property
    def family(self) -> str:
        """Which formats may meet in one GEMM: nvfp4, mx, fp8 or bf16."""
        return {"e4m3": "nvfp4", "e8m0": "mx", "fp32": "fp8", "none": "bf16"}[self.scale_type]

    @property
    def roundings(self) -> tuple[str, ...]:
        """Stochastic rounding is for 4-bit elements: no published recipe uses it on 8 bits."""
        return ROUNDINGS if self.element.packed else ("nearest",)

    @property
    def ties(self) -> tuple[str, ...]:
        """Public code disagrees on ties for E2M1 only."""
        return TIES if self.element.packed else ("even",)


ROUNDINGS = ("nearest", "stochastic", "stochastic_full")
TIES = ("even", "away")
_MX_BLOCKS = {"1d": (1, 32), "2d": (32, 32)}
_MX_RULES = ("floor", "ceil", "even", "rceil")
_FP8_BLOCKS = {"tensor": (WHOLE, WHOLE), "row": (1, WHOLE), "1d": (1, 128), "2d": (128, 128)}
_FP8_RULES = ("default", "pow2")

FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            "nvfp4",
            E2M1,
            "e4m3",
            {"1d": (1, 16), "2d": (16, 16)},
            ("default", "unbiased", "cap256", "four_over_six"),
        ),
        Format("mxfp4", E2M1, "e8m0", _MX_BLOCKS, (*_MX_RULES, "unbiased")),
        Format("mxfp8", E4M3, "e8m0", _MX_BLOCKS, _MX_RULES),
        Format("mxfp8_e5m2", E5M2, "e8m0", _MX_BLOCKS, _MX_RULES),
        Format("fp8_e4m3", E4M3, "fp32", _FP8_BLOCKS, _FP8_RULES),
        Format("fp8_e5m2", E5M2, "fp32", _FP8_BLOCKS, _FP8_RULES),
        Format("bf16", BF16, "none", {"default": (1, 1)}, ("default",)),
    )
}


def _check(key: str, value: str, allowed: tuple[str, ...], owner: str) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value!r} is not offered by {owner}; use {' | '.join(allowed)}")


@dataclass(frozen=True)
class QuantSpec:
    """How ONE operand of one GEMM is cast.

    ``block`` and ``scale`` given as "default" become the format's first block and first scale rule,
    so two specs that compute the same thing are equal.

    Raises:
        UserError: naming the field, for an unknown value or a combination that has no meaning.
    """

    format: str = "bf16"
    block: str = "default"
    rounding: str = "nearest"
    ties: str = "even"
    scale: str = "default"

    def __post_init__(self) -> None:
        _check("format", self.format, tuple(FORMATS), "fp4pretrain")
        row = self.row
        for key, offered in (("block", tuple(row.blocks)), ("scale", row.scale_rules)):
            if getattr(self, key) == "default":
                object.__setattr__(self, key, offered[0])
            _check(key, getattr(self, key), offered, self.format)
        _check("rounding", self.rounding, row.roundings, self.format)
        _check("ties", self.ties, row.ties, self.format)
        if self.scale == "four_over_six" and self.stochastic:
            raise UserError(
                "scale: four_over_six picks a scale by its nearest-rounding error and is for the "
                "forward pass; use rounding=nearest, or scale=unbiased"
            )

    @property
    def row(self) -> Format:
        """The format's row of the table."""
        return FORMATS[self.format]

    @property
    def stochastic(self) -> bool:
        """Whether a cast needs noise."""
        return self.rounding != "nearest"

    @property
    def quantized(self) -> bool:
        """Whether the operand is cast below BF16."""
        return self.row.scale_type != "none"

    @property
    def needs_tensor_amax(self) -> bool:
        """Whether its scales depend on the amax of the whole tensor."""
        return self.row.scale_type == "e4m3" or self.block == "tensor"

    @property
    def exact_in_bf16(self) -> bool:
        """Whether element x block scale fits in bfloat16: all but fp8 with fp32 block scales."""
        return self.row.scale_type != "fp32" or self.block == "tensor"

    def block_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one block of a tensor of this shape.

        Raises:
            UserError: where the blocks do not divide the tensor.
        """
        rows, cols = shape
        block_rows, block_cols = self.row.blocks[self.block]
        block_rows, block_cols = block_rows or rows, block_cols or cols
        if rows % block_rows or cols % block_cols:
            raise UserError(
                f"block: {self.format} {self.block} needs blocks of {block_rows}x{block_cols}, "
                f"which do not divide [{rows}, {cols}]; pad the tensor or keep this GEMM in bf16"
            )
        return block_rows, block_cols
