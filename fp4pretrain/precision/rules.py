"""Rules: which linears compute which GEMMs by another recipe, and when; and two short forms of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fp4pretrain.errors import UserError
from fp4pretrain.precision.recipe import BF16, GEMMS, Recipe
from fp4pretrain.precision.when import Point, Progress, Trigger, parse_point

# The linears of a block by their short names, in the order of their noise keys, and the head.
BLOCK_LINEARS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
LINEARS = tuple(BLOCK_LINEARS.values())
HEAD = "output_layer"
# Attention's projections are one matrix, of which rules may name parts. Parts that follow the same recipes
# for a whole run stay together, so a part of a plan is one of them or two.
QKV = BLOCK_LINEARS["qkv"]
QKV_PARTS = tuple(f"{QKV}.{letters}" for letters in ("q", "k", "v", "qk", "qv", "kv"))
_SHORT = {**BLOCK_LINEARS, "head": HEAD, **{letter: f"{QKV}.{letter}" for letter in "qkv"}}


def short_name(linear: str) -> str:
    """The short name of a linear, or of a part of one: ``fc2``, ``head``, ``qk``."""
    if linear in QKV_PARTS:
        return linear.removeprefix(f"{QKV}.")
    return next(short for short, name in _SHORT.items() if name == linear)


def qkv_rows(linear: str, *, heads: int, groups: int, head_size: int) -> int:
    """Output features of the projections, or of the part of them that ``linear`` names."""
    each = {"q": heads, "k": groups, "v": groups}
    letters = short_name(linear)
    return sum(each[letter] for letter in letters) * head_size


def _single_parts(linear: str) -> tuple[str, ...]:
    """The projections that a linear or a part stands for, each alone; any other linear itself."""
    if linear != QKV and linear not in QKV_PARTS:
        return (linear,)
    return tuple(f"{QKV}.{letter}" for letter in short_name(linear))


def linear_name(layer: int | None, linear: str) -> str:
    """The global name that patterns match: ``layers.3.mlp.linear_fc2``, or ``output_layer``."""
    return linear if layer is None else f"layers.{layer}.{linear}"


@dataclass(frozen=True)
class Rule:
    """From ``start`` until ``stop``, the named GEMMs of the named linears follow ``recipe``.

    Attributes:
        name: the rule's key in YAML, for messages.
        recipe: where the GEMMs' casts and rotations come from.
        gemms: fprop, dgrad, wgrad: those that the rule replaces.
        blocks: global blocks as a Python slice or index (``0:2``, ``-4:``, ``3``); None for all.
        linears: qkv, proj, fc1, fc2, head; or q, k, v, rows of qkv's matrix.
        modules: shell patterns on global names (``*.linear_qkv``); none for every linear named above.
        start: the moment from which the rule holds; None: from the beginning.
        stop: the moment at which it ends; None: it holds to the end.
        trigger: the rule holds from when it fires; None for a rule without one.
        release: ends that until the trigger fires again; None: it holds to the end.

    Raises:
        UserError: naming the key, for an unknown word.
    """

    name: str
    recipe: Recipe
    gemms: tuple[str, ...] = GEMMS
    blocks: str | None = None
    linears: tuple[str, ...] = tuple(BLOCK_LINEARS)
    modules: tuple[str, ...] = ()
    start: Point | None = None
    stop: Point | None = None
    trigger: Trigger | None = None
    release: Trigger | None = None

    def __post_init__(self) -> None:
        if self.release is not None and self.trigger is None:
            raise UserError(
                f"{self.key}.release: there is no trigger to release; give {self.key}.trigger, or use stop"
            )
        for key, values, known in (("gemms", self.gemms, GEMMS), ("linears", self.linears, _SHORT)):
            if not values:
                raise UserError(f"{self.key}.{key}: it names none; use {', '.join(known)}")
            for value in values:
                if value not in known:
                    raise UserError(
                        f"{self.key}.{key}: {value!r} is unknown; use {', '.join(known)}"
                    )
        if self.blocks is not None:
            _block_range(f"{self.key}.blocks", self.blocks, 1)
        start, stop = self.start, self.stop
        if start and stop and start.unit == stop.unit and start.value >= stop.value:
            raise UserError(f"{self.key}.stop: {stop} is not after start ({start}); raise it")

    @property
    def key(self) -> str:
        """The rule's key in a run config."""
        short = self.name.split(".")[0] in ("keep", "tail")
        return f"precision.{self.name}" if short else f"precision.rules.{self.name}"

    def covers(self, layer: int | None, linear: str, num_layers: int) -> bool:
        """Whether the rule is about this linear, or all of this part of one (``layer`` None: the head)."""
        return all(
            self._covers(layer, single, num_layers=num_layers) for single in _single_parts(linear)
        )

    def touches(self, layer: int | None, linear: str, num_layers: int) -> bool:
        """Whether the rule is about any part of this linear."""
        return any(
            self._covers(layer, single, num_layers=num_layers) for single in _single_parts(linear)
        )

    def _covers(self, layer: int | None, linear: str, *, num_layers: int) -> bool:
        """Whether the rule is about a linear that is not divided, or a single part."""
        whole = QKV if linear in QKV_PARTS else linear
        if not {whole, linear}.intersection(_SHORT[short] for short in self.linears):
            return False
        if self.blocks is not None:
            blocks = _block_range(f"{self.key}.blocks", self.blocks, num_layers)
            if layer is None or layer not in blocks:
                return False
        names = [linear_name(layer, name) for name in (whole, linear)]
        return not self.modules or any(
            fnmatchcase(name, pattern) for name in names for pattern in self.modules
        )

    def active(self, progress: Progress) -> bool:
        """Whether the rule holds for the next step."""
        begun = self.start is None or self.start.reached(progress)
        if self.trigger is not None:
            begun = begun and self.name in progress.fired
        return begun and not (self.stop is not None and self.stop.reached(progress))

    @property
    def timed(self) -> bool:
        """Whether the rule holds for a part of the run only."""
        return any(part is not None for part in (self.start, self.stop, self.trigger))

    def where_and_when(self) -> str:
        """One line for people: which linears, which GEMMs, when."""
        parts = [f"blocks {self.blocks}" if self.blocks else "all blocks", "/".join(self.linears)]
        if self.modules:
            parts.append(" ".join(self.modules))
        parts.append("+".join(self.gemms))
        if self.start:
            parts.append(f"from {self.start}")
        if self.stop:
            parts.append(f"until {self.stop}")
        if self.trigger:
            parts.append(f"once {self.trigger}")
        if self.release:
            parts.append(f"until {self.release}")
        return ", ".join(parts)


def _block_range(key: str, text: str, num_layers: int) -> range:
    """Global blocks of a Python slice or index."""
    index = re.fullmatch(r"\s*(-?\d+)\s*", text)
    if index:
        at = int(index[1])
        at += num_layers * (at < 0)
        return range(max(at, 0), min(at + 1, num_layers))
    parts = re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", text)
    if parts is None:
        raise UserError(f"{key}: {text!r} names no blocks; write 3, 0:2 or -4: as in Python")
    low, high = (int(part) if part else None for part in parts.groups())
    return range(*slice(low, high).indices(num_layers))


@dataclass(frozen=True)
class Keep:
    """What stays in BF16 for the whole run: a short form of rules.

    ``first_blocks`` and ``last_blocks``: a number of blocks (2) or a fraction of all blocks
    (0.13, rounded to the nearest block), so that one recipe serves 4 layers and 62;
    ``modules``: shell patterns on global names such as ``layers.3.mlp.linear_fc2`` or
    ``*.linear_qkv``.
    """

    first_blocks: float = 0
    last_blocks: float = 0
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("first_blocks", "last_blocks"):
            value = getattr(self, key)
            if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
                raise UserError(
                    f"precision.keep.{key}: {value} is neither a number of blocks (0, 1, 2, ...) "
                    "nor a fraction of them (0 to 1)"
                )

    def rules(self, num_layers: int) -> list[Rule]:
        """The rules that this form stands for."""

        def count(value: float) -> int:
            return math.floor(value * num_layers + 0.5) if value < 1 else int(value)

        first, last = count(self.first_blocks), count(self.last_blocks)
        found = []
        if first:
            found.append(Rule("keep.first_blocks", BF16, blocks=f"0:{first}"))
        if last:
            found.append(Rule("keep.last_blocks", BF16, blocks=f"{max(num_layers - last, 0)}:"))
        found += [Rule("keep.modules", BF16, modules=(pattern,)) for pattern in self.modules]
        return found


@dataclass(frozen=True)
class Tail:
    """The late switch, a short form of a rule: from ``at`` on the named GEMMs run in BF16.

    ``at``: a fraction of the run (0.82), or a moment such as ``500 steps`` or ``2B tokens``.
    """

    at: Any = None
    to_bf16: tuple[str, ...] = ("fprop",)

    def __post_init__(self) -> None:
        if parse_point("precision.tail.at", self.at) is not None and not self.to_bf16:
            raise UserError(
                "precision.tail.to_bf16: nothing would be switched; name fprop, dgrad, wgrad, or "
                "set precision.tail.at=null"
            )
        for gemm in self.to_bf16:
            if gemm not in GEMMS:
                raise UserError(
                    f"precision.tail.to_bf16: {gemm!r} is no GEMM; use fprop, dgrad, wgrad"
                )

    def rules(self) -> list[Rule]:
        """The rule that this form stands for, or none."""
        start = parse_point("precision.tail.at", self.at)
        return [] if start is None else [Rule("tail", BF16, gemms=self.to_bf16, start=start)]
