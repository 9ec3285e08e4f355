"""The recipe: how each operand of each of a linear's three GEMMs is cast.

    GEMM    computes                 operands    contracts over
    fprop   y  [t, n] = x  @ w.T     x, w        k  (input features)
    dgrad   dx [t, k] = dy @ w       dy, w       n  (output features)
    wgrad   dw [n, k] = dy.T @ x     dy, x       t  (tokens)

Six operands, six rows: a recipe prints as that table. A rotation belongs to a GEMM, never to an
operand, because it has to cancel in the product: a half-rotated GEMM cannot be written. How its sums are
held belongs to a GEMM too: in FP32, or with ``fast_accum`` in the registers of Hopper's and Ada's FP8
tensor cores, about 14 bits from the first product to the last (``docs/gpu.md`` has the error). Other
tensor cores, and FP8 in blocks of 128, have FP32 sums alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec

GEMMS = ("fprop", "dgrad", "wgrad")
OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
CONTRACTION = {"fprop": "k", "dgrad": "n", "wgrad": "tokens"}

ROTATION_KINDS = ("none", "hadamard", "random_hadamard")
ROTATION_SIZES = (16, 32, 64, 128)
RESAMPLE = ("never", "layer", "step", "gemm")
SIGNS = ("seed", "te")
ROTATED_DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Rotation:
    """A block Hadamard rotation along the contraction axis of both operands of one GEMM.

    ``kind`` none, hadamard (no signs) or random_hadamard; ``size`` 16 to 128; ``resample``: the
    random signs are one vector for the run (never), one a linear (layer), or drawn anew each step
    or for each GEMM of each microbatch (gemm: arXiv:2502.20586); ``signs`` seed, or te for
    Transformer Engine's fixed vector (arXiv:2509.25149's implementation), which has 16 signs that are
    never drawn anew: with another size or resample they come from the seed; ``dtype``: what the
    rotated operand is rounded to before its amax is taken, bf16 (Transformer Engine) or fp32 (not
    at all: arXiv:2605.09825).
    """

    kind: str = "none"
    size: int = 16
    resample: str = "never"
    signs: str = "seed"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        _one_of("rotation.kind", self.kind, ROTATION_KINDS)
        _one_of("rotation.size", self.size, ROTATION_SIZES)
        _one_of("rotation.resample", self.resample, RESAMPLE)
        _one_of("rotation.signs", self.signs, SIGNS)
        _one_of("rotation.dtype", self.dtype, ROTATED_DTYPES)
        self._settle()

    def _settle(self) -> None:
        """Set fields that have no effect here to their defaults, so that rotations that compute the same
        are equal."""
        fixed = self.size == 16 and self.resample == "never"
        if self.signs == "te" and not (self.kind == "random_hadamard" and fixed):
            object.__setattr__(self, "signs", "seed")
        if self.kind != "random_hadamard":
            object.__setattr__(self, "resample", "never")
        if self.kind == "none":
            object.__setattr__(self, "size", 16)
            object.__setattr__(self, "dtype", "bf16")

    @property
    def active(self) -> bool:
        return self.kind != "none"

    def __str__(self) -> str:
        if not self.active:
            return "-"
        held = ", fp32" if self.dtype == "fp32" else ""
        if self.kind == "hadamard":
            return f"H{self.size}{held}"
        return f"random H{self.size}, {self.signs} signs, resample {self.resample}{held}"


class _Gemm:
    """What the three GEMMs share."""

    rotation: Rotation

    @cached_property
    def specs(self) -> tuple[QuantSpec, QuantSpec]:
        """The casts of the two operands, in the order of OPERANDS."""
        first, second = OPERANDS[type(self).__name__.lower()]
        return getattr(self, first), getattr(self, second)

    @cached_property
    def contraction_multiple(self) -> int:
        """Both operands are cast as if padded with zeros to this multiple of the contraction axis.

        The least common multiple of their blocks and of the rotation; 1 in BF16.
        """
        sizes = [spec.contraction_block for spec in self.specs]
        return math.lcm(*sizes, self.rotation.size if self.rotation.active else 1)


@dataclass(frozen=True)
class Fprop(_Gemm):
    """y = x @ w.T"""

    x: QuantSpec = field(default_factory=QuantSpec)
    w: QuantSpec = field(default_factory=QuantSpec)
    rotation: Rotation = field(default_factory=Rotation)
    fast_accum: bool = False


@dataclass(frozen=True)
class Dgrad(_Gemm):
    """dx = dy @ w"""

    dy: QuantSpec = field(default_factory=QuantSpec)
    w: QuantSpec = field(default_factory=QuantSpec)
    rotation: Rotation = field(default_factory=Rotation)
    fast_accum: bool = False


@dataclass(frozen=True)
class Wgrad(_Gemm):
    """dw = dy.T @ x"""

    dy: QuantSpec = field(default_factory=QuantSpec)
    x: QuantSpec = field(default_factory=QuantSpec)
    rotation: Rotation = field(default_factory=Rotation)
    fast_accum: bool = False


Gemm = Fprop | Dgrad | Wgrad


@dataclass(frozen=True)
class Recipe:
    """All six operand casts of a linear layer. Frozen and hashable; ``str()`` is its table."""

    fprop: Fprop = field(default_factory=Fprop)
    dgrad: Dgrad = field(default_factory=Dgrad)
    wgrad: Wgrad = field(default_factory=Wgrad)

    HEADER: ClassVar[tuple[str, ...]] = (
        "GEMM",
        "operand",
        "format",
        "block",
        "rounding",
        "scale",
        "rotation",
    )

    def __post_init__(self) -> None:
        for gemm in GEMMS:
            _check_gemm(gemm, self.gemm(gemm))
        for gemm, operand, spec in self.operands():
            if spec.source == "forward":
                self._check_source(gemm, operand)

    def _check_source(self, gemm: str, operand: str) -> None:
        """``source: forward`` needs a forward operand that is a copy of the tensor as it is."""
        key, copied = f"precision.{gemm}.{operand}.source", ("dgrad.w", "wgrad.x")
        if f"{gemm}.{operand}" not in copied:
            raise UserError(
                f"{key}: the forward pass casts x and w alone; forward is for {' and '.join(copied)}"
            )
        if not self.operand("fprop", operand).quantized:
            raise UserError(
                f"{key}: fprop's {operand} is bf16, so there is no cast copy; use tensor"
            )
        if self.fprop.rotation.active:
            raise UserError(
                f"{key}: fprop's copy of {operand} is rotated; use precision.fprop.rotation.kind=none, "
                "or source: tensor"
            )

    def gemm(self, name: str) -> Gemm:
        """The GEMM ``fprop``, ``dgrad`` or ``wgrad``."""
        return getattr(self, name)

    def operand(self, gemm: str, operand: str) -> QuantSpec:
        """The cast of one operand, e.g. ``("wgrad", "dy")``."""
        return getattr(self.gemm(gemm), operand)

    @property
    def quantized(self) -> bool:
        """Whether any operand is cast below BF16."""
        return any(spec.quantized for _, _, spec in self.operands())

    def operands(self) -> list[tuple[str, str, QuantSpec]]:
        """The six rows: (gemm, operand, spec)."""
        return [(g, o, self.operand(g, o)) for g in GEMMS for o in OPERANDS[g]]

    def replaced(self, gemms: tuple[str, ...], other: Recipe) -> Recipe:
        """This recipe with the named GEMMs of ``other``."""
        taken: dict[str, Any] = {g: other.gemm(g) for g in gemms}
        return replace(self, **taken)

    def interned(self) -> Recipe:
        """The one object that stands for all equal recipes, since caches look recipes up by identity."""
        return _INTERNED.setdefault(self, self)

    def label(self) -> str:
        """A word for a table cell: BF16, or the formats of the three GEMMs where they differ."""
        found = []
        for gemm in GEMMS:
            formats = dict.fromkeys(s.format for s in self.gemm(gemm).specs)
            found.append("+".join(formats))
        return "BF16" if not self.quantized else "/".join(dict.fromkeys(found))

    def warnings(self) -> list[str]:
        """Lines about what the papers found harmful. It is allowed, since it may be the experiment."""
        said = []
        for gemm, operand, spec in self.operands():
            key = f"precision.{gemm}.{operand}"
            if not spec.quantized:
                continue
            if gemm == "fprop" and spec.rounding != "nearest":
                said.append(
                    f"{key}.rounding: stochastic rounding in the forward pass diverged in "
                    "arXiv:2509.25149 (sec. 4.4); nearest is usual"
                )
            rotation = self.gemm(gemm).rotation
            if spec.rounding_row.scales and rotation.resample not in ("step", "gemm"):
                said.append(
                    f"precision.{gemm}.rotation.resample: eden is unbiased over rotations that are drawn "
                    "anew (arXiv:2601.22813); use resample: gemm"
                )
            if spec.tiled and rotation.active:
                said.append(
                    f"{key}.block: 2d tiles exist so that w and its transpose share codes; rotating "
                    "w undoes that; use block: 1d or no rotation"
                )
        for gemm in GEMMS:
            specs = [self.operand(gemm, operand) for operand in OPERANDS[gemm]]
            if self.gemm(gemm).fast_accum and not all(map(_may_sum_fast, specs)):
                names = dict.fromkeys(f"{s.format} ({_block_text(s)})" for s in specs)
                said.append(
                    f"precision.{gemm}.fast_accum: it has no effect on {' and '.join(names)}; it is "
                    "for fp8_* with block tensor or row, and for mxfp4 where FP8 carries it"
                )
        return said

    def rows(self) -> list[tuple[str, ...]]:
        """The six rows as text, in the order of HEADER."""
        rows: list[tuple[str, ...]] = []
        for gemm, operand, spec in self.operands():
            quantized = spec.quantized
            rounding = "nearest" if not quantized else spec.rounding
            if quantized and spec.rounding == "nearest" and spec.ties != "even":
                rounding += f", ties {spec.ties}"
            rows.append(
                (
                    gemm,
                    operand,
                    _format_text(spec),
                    _block_text(spec) if quantized else "-",
                    rounding,
                    _scale_text(spec) if quantized else "-",
                    str(self.gemm(gemm).rotation),
                )
            )
        return rows

    def __str__(self) -> str:
        fast = [gemm for gemm in GEMMS if self.gemm(gemm).fast_accum]
        said = f"\nfast_accum on FP8 tensor cores: {', '.join(fast)}" if fast else ""
        return text_table(self.HEADER, self.rows()) + said


def text_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned plain text, for logs and ``plan.txt``."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    head = "  ".join(c.ljust(w) for c, w in zip(header, widths, strict=True)).rstrip()
    return "\n".join([head, "  ".join("-" * w for w in widths), *lines])


def _may_sum_fast(spec: QuantSpec) -> bool:
    """Whether FP8 tensor cores can multiply the operand without scaling inside the sum."""
    if spec.row.family == "fp8":
        return spec.block in ("tensor", "row")
    return spec.format == "mxfp4"


def _format_text(spec: QuantSpec) -> str:
    """The format; and whether the forward pass's copy is cast, or a sum of terms."""
    split = {
        "none": "",
        "mean": ", mean + rest",
        "channels": f", + {spec.channels:.2g} of channels",
    }
    source = " of fprop's" if spec.source == "forward" else ""
    return f"{spec.format}{source}{split[spec.split]}"


def _scale_text(spec: QuantSpec) -> str:
    """The scale rule, and where the tensor's amax comes from if not from the tensor."""
    amax = {
        "current": "",
        "fixed": f", amax {spec.amax_value:g}",
        "held": f", amax every {spec.amax_steps} steps",
        "delayed": f", amax of {spec.amax_steps} steps",
    }
    return spec.scale + amax[spec.amax]


def _block_text(spec: QuantSpec) -> str:
    rows, cols = spec.row.blocks[spec.block]
    return f"{rows}x{cols}" if cols else spec.block


def _check_gemm(name: str, gemm: Gemm) -> None:
    families = set()
    for operand in OPERANDS[name]:
        spec: QuantSpec = getattr(gemm, operand)
        if spec.tiled and operand != "w":
            raise UserError(
                f"precision.{name}.{operand}.block: {spec.block} is for w, whose transpose shares its "
                f"codes; use {spec.block.replace('2d', '1d')}"
            )
        if spec.rounding_row.scales and gemm.rotation.kind != "random_hadamard":
            raise UserError(
                f"precision.{name}.rotation.kind: {operand}'s eden rounding is unbiased over random "
                "rotations alone; use random_hadamard"
            )
        if spec.split == "mean" and operand == "w":
            raise UserError(
                f"precision.{name}.w.split: a weight has no tokens to take the mean of; use none"
            )
        if spec.split == "channels" and gemm.rotation.active:
            raise UserError(
                f"precision.{name}.{operand}.split: a rotation mixes the channels; use "
                f"precision.{name}.rotation.kind=none, or split: none"
            )
        if spec.quantized:
            families.add(spec.row.family)
    if len(families) > 1:
        first, second = OPERANDS[name]
        raise UserError(
            f"precision.{name}: {first} is {getattr(gemm, first).format} and {second} is "
            f"{getattr(gemm, second).format}; the operands of one GEMM need formats of one family "
            "(nvfp4, mx*, fp8_*), or bf16"
        )
    if gemm.rotation.active and not families:
        raise UserError(
            f"precision.{name}.rotation: both operands are bf16, a rotation would only cost time; "
            "set kind: none or quantize an operand"
        )


def _one_of(key: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value!r} is none of {', '.join(map(str, allowed))}; choose one")


_INTERNED: dict[Recipe, Recipe] = {}
BF16 = Recipe().interned()
