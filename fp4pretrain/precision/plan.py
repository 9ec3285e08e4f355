"""The plan: which linear computes by which recipe, and when.

A plan is one recipe for the linears of all blocks, BF16 for the head, and an ordered list of rules.
For each GEMM of a linear the last rule that covers it and is active wins. The order is: ``keep``, the
rules of the YAML in their order, ``tail``. Layers are counted globally (0 is the model's first block
on every pipeline layout), so a plan is the same text on one process and on a thousand.

Attention's projections are one linear, until rules name parts of it (q, k, v): in a layer whose parts ever
follow different recipes, each part is a linear of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

from fp4pretrain.errors import UserError
from fp4pretrain.precision.deoscillation import Deoscillation
from fp4pretrain.precision.recipe import BF16, OPERANDS, Gemm, Recipe, text_table
from fp4pretrain.precision.rules import (
    BLOCK_LINEARS,
    HEAD,
    LINEARS,
    QKV,
    QKV_PARTS,
    Keep,
    Rule,
    Tail,
    short_name,
)
from fp4pretrain.precision.when import Progress


@dataclass(frozen=True)
class Plan:
    """(global layer, linear, progress) -> Recipe. Raises UserError for a plan that cannot be meant.

    ``ordered`` has all rules, those of ``keep`` and ``tail`` included; the last that matches wins.
    ``deoscillation`` sets swinging weights onto their casts between steps.
    """

    recipe: Recipe
    num_layers: int
    keep: Keep = field(default_factory=Keep)
    tail: Tail = field(default_factory=Tail)
    rules: tuple[Rule, ...] = ()
    deoscillation: Deoscillation = field(default_factory=Deoscillation)
    ordered: tuple[Rule, ...] = field(init=False, compare=False, repr=False)
    _resolved: dict = field(default_factory=dict, init=False, compare=False, repr=False)
    _places: tuple = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", self.recipe.interned())
        ordered = *self.keep.rules(self.num_layers), *self.rules, *self.tail.rules()
        object.__setattr__(self, "ordered", ordered)
        for rule in self.ordered:
            if not any(rule.covers(*place, self.num_layers) for place in self._single()):
                raise UserError(
                    f"{rule.key}: it matches no linear ({rule.where_and_when()}); names look like "
                    f"layers.0.{LINEARS[0]} (layers 0 to {self.num_layers - 1}) and {HEAD}"
                )
        object.__setattr__(self, "_places", tuple(self._divided()))
        self.deoscillation.check(self.recipe)
        if self.deoscillation and any(linear in QKV_PARTS for _, linear in self.linears()):
            raise UserError(
                "precision.deoscillation.period: it follows whole weight matrices, and rules divide that "
                "of attention's projections (q, k, v); name qkv in them, or set period to 0"
            )
        if self.recipe.quantized and not self.ever_quantized:
            raise UserError(
                f"precision.keep: it keeps all {self.num_layers} blocks in BF16, so nothing is "
                "quantized; keep fewer blocks or use precision=bf16"
            )

    def linears(self) -> Iterator[tuple[int | None, str]]:
        """(global layer, linear) of every linear the plan governs; the head last, without a layer.

        Where rules divide attention's projections, each part is one (``self_attention.linear_qkv.qk``).
        """
        yield from self._places

    def parts(self, layer: int) -> tuple[str, ...]:
        """The parts of a layer's attention projections; the linear itself where they are not divided."""
        here = [linear for at, linear in self._places if at == layer]
        return tuple(linear for linear in here if linear == QKV or linear in QKV_PARTS)

    def _single(self) -> Iterator[tuple[int | None, str]]:
        """(global layer, linear) with each of attention's projections alone."""
        for layer in range(self.num_layers):
            for linear in (*(f"{QKV}.{letter}" for letter in "qkv"), *LINEARS):
                if linear != QKV:
                    yield layer, linear
        yield None, HEAD

    def _divided(self) -> Iterator[tuple[int | None, str]]:
        """The places of ``linears``: projections that always follow one recipe stay together."""
        projections = tuple(f"{QKV}.{letter}" for letter in "qkv")
        moments = list(product(*((False, True) if r.timed else (True,) for r in self.ordered)))
        for layer in range(self.num_layers):
            told_apart = any(
                len({rule.covers(layer, one, self.num_layers) for one in projections}) > 1
                for rule in self.ordered
            )
            together: dict[tuple[Recipe, ...], str] = {}
            for one in projections:
                always = [self._with(layer, one, now) for now in moments if told_apart]
                together[tuple(always)] = together.get(tuple(always), "") + short_name(one)
            for letters in together.values():
                yield layer, QKV if letters == "qkv" else f"{QKV}.{letters}"
            yield from ((layer, linear) for linear in LINEARS if linear != QKV)
        yield None, HEAD

    def at(self, layer: int | None, linear: str, progress: Progress) -> Recipe:
        """The recipe of one linear for the next step; equal recipes are one object."""
        return self._with(layer, linear, self._active(progress))

    def switches(self, before: Progress, now: Progress) -> bool:
        """Whether any linear of the model has another recipe now than before."""
        then, active = self._active(before), self._active(now)
        if then == active:
            return False
        return any(
            self._with(*place, then) is not self._with(*place, active) for place in self.linears()
        )

    def _active(self, progress: Progress) -> tuple[bool, ...]:
        return tuple([rule.active(progress) for rule in self.ordered])

    def _with(self, layer: int | None, linear: str, active: tuple[bool, ...]) -> Recipe:
        key = layer, linear, active
        found = self._resolved.get(key)
        if found is None:
            found = BF16 if linear == HEAD else self.recipe
            for rule, holds in zip(self.ordered, active, strict=True):
                if holds and rule.covers(layer, linear, self.num_layers):
                    found = found.replaced(rule.gemms, rule.recipe)
            found = self._resolved[key] = found.interned()
        return found

    def with_rules(
        self, layer: int | None, linear: str, holding: Mapping[str, bool] | None = None
    ) -> Recipe:
        """The recipe of one linear where the named rules hold; without names, those that always do."""
        told = {rule.name: not rule.timed for rule in self.ordered} if holding is None else holding
        return self._with(layer, linear, tuple(told[rule.name] for rule in self.ordered))

    def recipes_of(self, layer: int | None, linear: str) -> list[Recipe]:
        """Every recipe that this linear can ever follow, the one without timed rules first."""
        choices = []
        for rule in self.ordered:
            switches = rule.timed and rule.covers(layer, linear, self.num_layers)
            choices.append((False, True) if switches else (not rule.timed,))
        return list(dict.fromkeys(self._with(layer, linear, one) for one in product(*choices)))

    def recipes(self) -> list[Recipe]:
        """Every recipe that can ever run, the head's included."""
        return list(dict.fromkeys(r for place in self.linears() for r in self.recipes_of(*place)))

    @property
    def ever_quantized(self) -> bool:
        """Whether any linear is ever cast below BF16."""
        return any(recipe.quantized for recipe in self.recipes())

    def warnings(self) -> list[str]:
        """``Recipe.warnings`` of every recipe of the plan."""
        return list(dict.fromkeys(text for recipe in self.recipes() for text in recipe.warnings()))

    def check_shards(self, linear: str, *, n: tuple[int, ...], k: int | None) -> None:
        """Refuse tensor-parallel shards that end inside a block or a rotation.

        Such a shard would be padded with zeros where one process has its neighbour's elements, so
        another layout would compute other numbers.

        Args:
            n: lengths of the parts of the output features that one rank holds, () if it holds all.
            k: input features that one rank holds, None if it holds all.

        Raises:
            UserError: naming the key and the cure.
        """
        for layer in (at for at, name in self.linears() if name == linear):
            for recipe in self.recipes_of(layer, linear):
                for length in n:
                    _check_shard(recipe, linear, length, contracted="dgrad", tiled="fprop")
                if k is not None:
                    _check_shard(recipe, linear, k, contracted="fprop", tiled="dgrad")

    def __str__(self) -> str:
        start = self._active(Progress())
        rows = []
        for layer in range(self.num_layers):
            qkv = [
                (name, self._label(self._with(layer, name, start))) for name in self.parts(layer)
            ]
            cells = [self._label(self._with(layer, name, start)) for name in LINEARS if name != QKV]
            if len(qkv) > 1:
                told = ", ".join(f"{short_name(name)} {label}" for name, label in qkv)
            else:
                told = qkv[0][1]
            rows.append((str(layer), told, *cells))
        quantized = sum(self._with(i, n, start).quantized for i, n in self.linears())
        lines = [str(self.recipe), "", f"{quantized} of {len(self._places) - 1} linears "]
        lines[-1] += (
            "of the blocks are quantized at the start; embedding, norms and attention products "
            f"never are; head: {self._label(self._with(None, HEAD, start))}"
        )
        for rule in self.ordered:
            lines.append(f"rule {rule.name}: {rule.where_and_when()}: {_rule_text(rule)}")
        if self.deoscillation:
            lines.append(f"deoscillation: {self.deoscillation}")
        header = ("layer", *BLOCK_LINEARS)
        return "\n".join([*lines, "", text_table(header, rows)])

    def _label(self, recipe: Recipe) -> str:
        if recipe == self.recipe:
            return "recipe"
        return recipe.label()


def _rule_text(rule: Rule) -> str:
    """What a rule's GEMMs compute: BF16, or rows of a table."""
    chosen = BF16.replaced(rule.gemms, rule.recipe)
    if not chosen.quantized:
        return "BF16"
    rows = [row for row in chosen.rows() if row[0] in rule.gemms]
    return "\n" + text_table(Recipe.HEADER, rows)


def _check_shard(recipe: Recipe, linear: str, length: int, *, contracted: str, tiled: str) -> None:
    gemm: Gemm = recipe.gemm(contracted)
    multiple = gemm.contraction_multiple
    if length % multiple:
        key = f"precision.{contracted}.{OPERANDS[contracted][0]}.block"
        if gemm.rotation.active and length % gemm.rotation.size:
            key = f"precision.{contracted}.rotation.size"
        raise UserError(
            f"{key}: a rank holds {length} features of {linear}, which blocks of {multiple} do not "
            "divide, so another layout would compute other numbers; change parallel.tensor or the "
            "model's sizes"
        )
    for operand, spec in zip(OPERANDS[contracted], gemm.specs, strict=True):
        if spec.split == "channels":
            raise UserError(
                f"precision.{contracted}.{operand}.split: channels are chosen among all features of "
                f"{linear}, and a rank holds {length} of them; use parallel.tensor=1, or split: none"
            )
    rows = math.lcm(*(r or 1 for r, _ in recipe.operand(tiled, "w").level_blocks))
    if length % rows:
        raise UserError(
            f"precision.{tiled}.w.block: a rank holds {length} rows of {linear}'s weight, which 2d "
            f"tiles of {rows} do not divide; use block: 1d, or change parallel.tensor"
        )
