"""How ONE operand of ONE GEMM is cast: a frozen record that is checked when it is made.

A spec that exists can be computed: it picks a row of ``FORMATS`` and says how to round to it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from fp4pretrain.errors import UserError
from fp4pretrain.numerics.formats import FORMATS, ROUNDINGS, WHOLE, Block, Format, Rounding

# Significant bits that a scale of each type adds to a product; a power of two adds none.
_SCALE_BITS = {"e4m3": 4, "ue5m3": 4, "e8m0": 0}
_BF16_BITS = 8
SOURCES = ("tensor", "forward")
SPLITS = ("none", "mean", "channels")
AMAXES = ("current", "fixed", "held", "delayed")


def _check(key: str, value: str, allowed: Iterable[str], owner: str) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value!r} is not offered by {owner}; use {' | '.join(allowed)}")


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is cast.

    ``block`` and ``scale`` given as "default" become the format's first block and first scale rule
    (``rounding: eden`` brings its own), so two specs that compute the same thing are equal.

    Attributes:
        format: a name of ``FORMATS``.
        block: what shares a scale: a word of the format's ``blocks``.
        rounding: how elements are rounded: a word of the format's ``roundings``.
        ties: where a value between two elements goes: ``even`` or ``away`` from zero.
        scale: a word of the format's ``scale_rules``.
        source: what is cast: the tensor, or the copy that the forward pass multiplied (``forward``,
            for dgrad's w and wgrad's x; arXiv:2601.22813).
        split: what an operand is a sum of, each term cast alone: ``none``; ``mean``, the mean over
            tokens and what remains (arXiv:2603.10444); ``channels``, the cast matrix and what it lost
            in the ``channels`` share of the contraction axis that lost most (arXiv:2602.02047).
        channels: that share, from above 0 to 1.
        amax: the amax that a scale of the whole tensor is made from: measured (``current``);
            ``fixed``, which is ``amax_value`` (arXiv:2605.06067); ``held``, measured every
            ``amax_steps`` steps (arXiv:2609.02846); ``delayed``, the largest of the last
            ``amax_steps`` steps (arXiv:2209.05433).

    Raises:
        UserError: naming the field, for an unknown value or a combination that has no meaning.
    """

    format: str = "bf16"
    block: str = "default"
    rounding: str = "nearest"
    ties: str = "even"
    scale: str = "default"
    source: str = "tensor"
    split: str = "none"
    channels: float = 0.09
    amax: str = "current"
    amax_value: float = 1.0
    amax_steps: int = 50

    def __post_init__(self) -> None:
        _check("format", self.format, FORMATS, "fp4pretrain")
        row = self.row
        if (self.rounding, self.scale) == ("eden", "default") and "eden" in row.scale_rules:
            object.__setattr__(self, "scale", "eden")
        for key, offered in (("block", tuple(row.blocks)), ("scale", row.scale_rules)):
            if getattr(self, key) == "default":
                object.__setattr__(self, key, offered[0])
            _check(key, getattr(self, key), offered, self.format)
        _check("rounding", self.rounding, row.roundings, self.format)
        _check("ties", self.ties, row.ties, self.format)
        _check("source", self.source, SOURCES, "fp4pretrain")
        _check("split", self.split, SPLITS, "fp4pretrain")
        _check("amax", self.amax, AMAXES, "fp4pretrain")
        self._check_estimator()
        self._check_amax()
        self._settle_unused()

    def _check_estimator(self) -> None:
        if self.scale == "four_over_six" and self.stochastic:
            raise UserError(
                "scale: four_over_six picks a scale by its nearest-rounding error and is for the "
                "forward pass; use rounding=nearest, or scale=unbiased"
            )
        if self.rounding_row.scales != (self.scale == "eden"):
            raise UserError(
                f"rounding: eden and scale: eden are one estimator, and here they are {self.rounding} and "
                f"{self.scale}; use rounding: eden and leave scale out, or use neither"
            )
        if self.scale == "eden" and self.block != "1d":
            raise UserError("rounding: eden corrects the scales of 1d blocks; use block: 1d")
        for key in ("source", "split"):
            if not self.quantized and getattr(self, key) != getattr(type(self), key):
                raise UserError(
                    f"{key}: {getattr(self, key)} says how a cast is made, and bf16 is none; use a "
                    f"quantized format, or {key}: {getattr(type(self), key)}"
                )
        if not 0 < self.channels <= 1:
            raise UserError(f"channels: {self.channels} is no share; use a number above 0, up to 1")

    def _check_amax(self) -> None:
        if not 0 < self.amax_value < float("inf"):
            raise UserError(f"amax_value: {self.amax_value} is no magnitude; use one above 0")
        if self.amax_steps < 1:
            raise UserError(f"amax_steps: {self.amax_steps} is no number of steps; use 1 or more")
        if self.amax == "current":
            return
        if self.amax_span != "tensor":
            raise UserError(
                f"amax: {self.amax} is for a scale of the whole tensor, which {self.format} with block "
                f"{self.block} does not have; use amax: current"
            )

    def _settle_unused(self) -> None:
        """Set numbers that nothing reads to their defaults, so that casts that compute the same are equal."""
        used = {
            "channels": self.split == "channels",
            "amax_value": self.amax == "fixed",
            "amax_steps": self.amax in ("held", "delayed"),
        }
        for key, read in used.items():
            if not read:
                object.__setattr__(self, key, getattr(type(self), key))

    @property
    def row(self) -> Format:
        """The format's row of the table."""
        return FORMATS[self.format]

    @property
    def rounding_row(self) -> Rounding:
        """The rounding's row of its table."""
        return ROUNDINGS[self.rounding]

    @property
    def stochastic(self) -> bool:
        """Whether a cast needs noise."""
        return self.rounding_row.noise_bits > 0

    @property
    def quantized(self) -> bool:
        """Whether the operand is cast below BF16."""
        return self.row.quantized

    @property
    def tiled(self) -> bool:
        """Whether blocks are as tall as they are wide, so that a matrix and its transpose share codes."""
        rows, cols = self.row.blocks[self.block]
        return rows == cols > 1

    @cached_property
    def level_blocks(self) -> tuple[Block, ...]:
        """The block of each scale level, innermost first."""
        return tuple(level.blocks[self.block] for level in self.row.levels)

    @cached_property
    def amax_span(self) -> str:
        """What the outermost scale is shared by: tensor, row, or block (BF16 too).

        ``tensor`` and ``row`` reach over the whole contraction axis. Where tensor parallelism shards
        that axis, their largest magnitudes are reduced over the ranks.
        """
        if not self.level_blocks or self.level_blocks[-1][1] != WHOLE:
            return "block"
        return "tensor" if self.level_blocks[-1][0] == WHOLE else "row"

    @cached_property
    def exact_in_bf16(self) -> bool:
        """Whether element times the scales that lie on it fits in bfloat16's 8 significant bits.

        The scales that ``alpha`` carries do not count.
        """
        significant = self.row.element.mantissa_bits + 1
        for level, block in zip(self.row.levels, self.level_blocks, strict=True):
            if block[1] == WHOLE:
                continue
            if level.type not in _SCALE_BITS:
                return False
            significant += _SCALE_BITS[level.type]
        return significant <= _BF16_BITS

    @property
    def contraction_block(self) -> int:
        """Elements of the longest block along the contraction axis, 1 where blocks span the axis."""
        return max((cols or 1 for _, cols in self.level_blocks), default=1)

    def block_shape(self, shape: tuple[int, int], level: int = 0) -> Block:
        """Rows and columns of one block of a level in a tensor of this shape."""
        if not self.level_blocks:
            return 1, 1
        block_rows, block_cols = self.level_blocks[level]
        return block_rows or shape[0], block_cols or shape[1]

    def padded_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """``shape`` up to whole blocks of every level: what a cast computes on, zeros appended."""
        rows, cols = shape
        for block_rows, block_cols in self.level_blocks:
            rows = -(-rows // (block_rows or 1)) * (block_rows or 1)
            cols = -(-cols // (block_cols or 1)) * (block_cols or 1)
        return rows, cols


def every_spec() -> list[QuantSpec]:
    """All casts that the tables of formats, roundings and scale rules offer, by default amaxes."""
    found = []
    for row in FORMATS.values():
        for fields in itertools.product(row.blocks, row.roundings, row.ties, row.scale_rules):
            with contextlib.suppress(UserError):  # a combination without a meaning
                found.append(QuantSpec(row.name, *fields))
    return list(dict.fromkeys(found))
