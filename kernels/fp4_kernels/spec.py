"""What one copy of a matrix is: format, block, scale rule, rounding, rotation, noise, output.

A copy is described in the words of fp4pretrain's recipes; ``Copy.config`` turns them into the
compile-time tuple that ``copies.py`` documents. Everything a kernel must be compiled for is in that
tuple; keys, signs and offsets are arguments of a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Element:
    """An element grid: its name in the kernels, largest value, that value's exponent, mantissa bits."""

    name: str
    max: float
    emax: int
    mantissa: int
    dtype: torch.dtype


E2M1 = Element("e2m1", 6.0, 2, 1, torch.uint8)
E4M3 = Element("e4m3", 448.0, 8, 3, torch.float8_e4m3fn)
E5M2 = Element("e5m2", 57344.0, 15, 2, torch.float8_e5m2)

# name: (kind, element, block length along the contraction axis by block name; 0: given by amax)
FORMATS: dict[str, tuple[str, Element, dict[str, int]]] = {
    "nvfp4": ("nvfp4", E2M1, {"1d": 16, "2d": 16}),
    "mxfp4": ("mx", E2M1, {"1d": 32, "2d": 32}),
    "mxfp8": ("mx", E4M3, {"1d": 32, "2d": 32}),
    "mxfp8_e5m2": ("mx", E5M2, {"1d": 32, "2d": 32}),
    "fp8_e4m3": ("fp8", E4M3, {"tensor": 0, "row": 0, "1d": 128, "2d": 128}),
    "fp8_e5m2": ("fp8", E5M2, {"tensor": 0, "row": 0, "1d": 128, "2d": 128}),
}
# NVFP4 scale rules: (largest block scale, what an element's block amax is encoded to)
NVFP4_RULES = {
    "default": (448.0, 6.0),
    "unbiased": (448.0, 6.0 * 16.0 / 17.0),
    "cap256": (256.0, 6.0),
    "four_over_six": (256.0, 6.0),
}
_RULES = {
    "nvfp4": tuple(NVFP4_RULES),
    "mx": ("floor", "ceil", "even", "rceil", "unbiased", "default"),
    "fp8": ("default", "pow2"),
}
ROUNDINGS = ("nearest", "stochastic", "stochastic_full")
TIES = ("even", "away")
OUTPUTS = ("codes", "exact", "e4m3")
ROTATIONS = (0, 16, 32, 64, 128)


@dataclass(frozen=True)
class Noise:
    """A 64-bit key, and where the copy sits in the whole operand (in the copy's own rows and columns).

    Local row r is row ``row_offset + r + (r // row_part) * row_gap`` of the whole (no parts: 0);
    columns likewise, in multiples of sixteen.
    """

    key: int
    row_offset: int = 0
    col_offset: int = 0
    row_part: int = 0
    row_gap: int = 0
    col_part: int = 0
    col_gap: int = 0


class Turn(NamedTuple):
    """A rotation as ``amax`` takes it: size (0 for none), signs, whether the result stays in fp32 (otherwise
    bfloat16), and ``Copy.draw``."""

    size: int = 0
    signs: tuple[int, ...] | None = None
    fp32: bool = False
    draw: torch.Tensor | None = None


NO_TURN = Turn()
LEFT_TURN = 16  # the size of rotation along tokens whose amax a kernel can leave


@dataclass(frozen=True)
class Leave:
    """The amaxes that a kernel leaves of the matrix that it writes, for casts that come.

    Attributes:
        plain: the largest magnitude.
        turn: that of the transpose rotated by 16 along the matrix's rows, with signs that are the same in
            every step; None to leave it out.
        out: int32 [2] of zeros, which become the bits of the two as fp32.
    """

    plain: bool
    turn: Turn | None
    out: torch.Tensor

    @property
    def amaxes(self) -> torch.Tensor:
        """fp32 [2], once the kernel has run."""
        return self.out.view(torch.float32)

    def arguments(self) -> tuple[torch.Tensor, tuple[int, int], tuple]:
        """(out, words of sign bits, compile-time constants of ``leave_amaxes``)."""
        size, signs, fp32, _ = self.turn or NO_TURN
        return self.out, sign_words(signs), (self.plain, size, signs is not None, not fp32)


class ColumnSums(NamedTuple):
    """Where the sums of a written matrix's columns go: fp32 [N]; added to what is there, or written."""

    out: torch.Tensor
    add: bool


@dataclass(frozen=True)
class Copy:
    """One quantized copy of a matrix, its blocks along its last axis.

    Attributes:
        format: nvfp4 | mxfp4 | mxfp8 | mxfp8_e5m2 | fp8_e4m3 | fp8_e5m2.
        block: 1d | 2d; tensor | row for fp8, whose scale then comes from the amax that is given.
        rounding: nearest | stochastic (8 bits an element) | stochastic_full (24 bits).
        ties: even | away (E2M1 only).
        scale: nvfp4: default | unbiased | cap256 | four_over_six; mx: floor | ceil | even | rceil |
            unbiased; fp8: default | pow2.
        output: codes (packed 4-bit codes or FP8, and scales) | exact (bfloat16 element x block scale) |
            e4m3 (mxfp4 as E4M3 under one power of two a row).
        rotation: 0, or the size of a block Hadamard rotation (16 to 128) before quantization.
        signs: +-1 a rotated position, applied first; None for none.
        noise: for stochastic rounding.
        rotated_fp32: a rotated copy is cast from fp32; otherwise it is rounded to bfloat16 first.
        draw: int64 [4] on the device whose first three words (`draw_words`) are read by the kernels in place
            of the noise's key and of the signs: a captured launch then draws anew each time it is replayed.
            ``noise`` and ``signs`` still say that there are some, and where the copy sits.
    """

    format: str
    block: str = "1d"
    rounding: str = "nearest"
    ties: str = "even"
    scale: str = "default"
    output: str = "codes"
    rotation: int = 0
    signs: tuple[int, ...] | None = None
    noise: Noise | None = None
    rotated_fp32: bool = False
    draw: torch.Tensor | None = field(default=None, compare=False)

    @property
    def turn(self) -> Turn:
        """The rotation before quantization, as ``amax`` takes it."""
        draw = self.draw if self.signs is not None else None
        return Turn(self.rotation, self.signs, self.rotated_fp32, draw)

    @property
    def element(self) -> Element:
        """The element grid of the format."""
        return FORMATS[self.format][1]

    @property
    def block_length(self) -> int:
        """Elements of a block along the contraction axis; 0 for a whole tensor or row."""
        return FORMATS[self.format][2][self.block]

    @cached_property
    def amax(self) -> str:
        """What amax a launch needs: none, tensor (a scalar) or row (one a row of the copy)."""
        kind = FORMATS[self.format][0]
        if kind == "nvfp4" or self.block == "tensor":
            return "tensor"
        return "row" if self.output == "e4m3" or self.block == "row" else "none"

    def drawn(
        self,
        noise: Noise | None,
        signs: tuple[int, ...] | None,
        draw: torch.Tensor | None = None,
    ) -> Copy:
        """This copy with another draw (as many parts, signs or none as before), faster than ``replace``."""
        copy = object.__new__(Copy)
        copy.__dict__.update(self.__dict__, noise=noise, signs=signs, draw=draw)
        return copy

    def config(self) -> tuple:
        """The compile-time tuple of the kernels.

        Raises:
            ValueError: for a word that is not offered.
        """
        return self._config

    @cached_property
    def _config(self) -> tuple:
        parts = self.noise is not None and bool(self.noise.row_part or self.noise.col_part)
        return _config(
            (self.format, self.block, self.scale, self.rounding, self.ties, self.output),
            self.rotation,
            (self.signs is not None, self.rotated_fp32, parts),
        )

    def launch_scalars(self) -> tuple[int, ...]:
        """Key, two words of sign bits, and the noise's offsets, as signed integers."""
        lo, hi = sign_words(self.signs)
        n = self.noise
        if n is None:
            return (0, lo, hi, 0, 1, 0, 0, 1, 0)
        if n.col_offset % 16 or n.col_part % 16 or n.col_gap % 16:
            raise ValueError(f"noise: columns are placed in multiples of 16, got {n}")
        return (
            _signed(n.key), lo, hi, n.row_offset, n.row_part or _FAR, n.row_gap,
            n.col_offset // 16, (n.col_part or _FAR) // 16, n.col_gap // 16,
        )  # fmt: skip


_FAR = 1 << 30  # a part longer than any tensor: no gap is ever left out


def _signed(word: int) -> int:
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word


@lru_cache(maxsize=4096)
def sign_words(signs: tuple[int, ...] | None) -> tuple[int, int]:
    """Two signed 64-bit words with bit j set where sign j is -1."""
    bits = sum(1 << j for j, sign in enumerate(signs or ()) if sign < 0)
    return _signed(bits), _signed(bits >> 64)


def draw_words(key: int, signs: tuple[int, ...] | None) -> tuple[int, int, int, int]:
    """The words of ``Copy.draw``: a noise key, two words of sign bits, and one that is unused."""
    return (_signed(key), *sign_words(signs), 0)


@lru_cache(maxsize=4096)
def _config(words: tuple[str, ...], rotation: int, flags: tuple[bool, bool, bool]) -> tuple:
    format_, block, scale, rounding, ties, output = words
    signs, rotated_fp32, parts = flags
    missing = why_missing(format_, block=block, scale=scale, rounding=rounding, ties=ties)
    if missing:
        raise ValueError(missing)
    kind, element, blocks = FORMATS[format_]
    tensor_max, scaled_max = element.max, element.max
    if kind == "nvfp4":
        cap, scaled_max = NVFP4_RULES[scale]
        tensor_max = cap * scaled_max
    if output not in OUTPUTS or (output == "e4m3" and format_ != "mxfp4"):
        raise ValueError(f"output: {output!r} is not offered for {format_}")
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: {rotation} is not offered; use {ROTATIONS}")
    amax = Copy(format_, block, output=output).amax
    return (
        kind, element.name, blocks[block], block == "2d", scale, rounding, ties, output, rotation,
        signs, parts, tensor_max, 1.0 / scaled_max, element.emax, 0x400000 >> element.mantissa, amax,
        not rotated_fp32,
    )  # fmt: skip


def why_missing(format_: str, *, block: str, scale: str, rounding: str, ties: str) -> str | None:
    """None if the kernels make such a copy, otherwise the reason in one clause."""
    if format_ not in FORMATS:
        return f"its kernels have no format {format_}"
    kind, element, blocks = FORMATS[format_]
    if block not in blocks:
        return f"its kernels have no block {block} of {format_}"
    if scale not in _RULES[kind]:
        return f"its kernels have no scale rule {scale} of {format_}"
    if rounding not in (ROUNDINGS if element is E2M1 else ROUNDINGS[:1]):
        return f"its kernels do not round {format_} by {rounding}"
    if ties not in (TIES if element is E2M1 else TIES[:1]):
        return f"its kernels have no ties {ties} of {format_}"
    return None
