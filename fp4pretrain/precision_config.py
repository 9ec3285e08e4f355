"""The precision section of the run config, and the Plan that it describes.

The dataclasses of ``precision`` are frozen and check themselves; Hydra needs schemas that overrides can
change. So each schema here is made from its frozen class, field by field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.precision import (
    GEMMS,
    OPERANDS,
    Deoscillation,
    Dgrad,
    Fprop,
    Keep,
    Plan,
    Recipe,
    Rotation,
    Rule,
    Tail,
    Wgrad,
    parse_point,
    parse_trigger,
)
from fp4pretrain.precision.rules import BLOCK_LINEARS
from fp4pretrain.schema import mutable

RecipeFprop = mutable(Fprop)
RecipeDgrad = mutable(Dgrad)
RecipeWgrad = mutable(Wgrad)
KeepConfig = mutable(Keep)
TailConfig = mutable(Tail)
DeoscillationConfig = mutable(Deoscillation)


@dataclass
class RuleConfig:
    """One rule: which GEMMs of which linears compute by another recipe, and when.

    ``recipe``: a file of ``configs/precision`` that the GEMMs come from; or give ``fprop``, ``dgrad``,
    ``wgrad`` themselves (they win over the file's). ``gemms``: default all three of a file, or those
    given. ``blocks``: global blocks as in Python (3, '0:2', '-4:'), null for all. ``linears``: qkv, proj,
    fc1, fc2, head; q, k or v for their rows of qkv alone. ``modules``: patterns on global names. ``start``,
    ``stop``: a fraction of the run, '500 steps' or '2B tokens'; null: from the first step, to the last.
    ``trigger``: the rule holds once a measured quantity meets this ("gap > 0.02 for 3"); ``release`` ends it.
    """

    recipe: str | None = None
    gemms: list[str] = field(default_factory=list)
    blocks: Any = None
    linears: list[str] = field(default_factory=lambda: list(BLOCK_LINEARS))
    modules: list[str] = field(default_factory=list)
    start: Any = None
    stop: Any = None
    trigger: str | None = None
    release: str | None = None
    fprop: RecipeFprop | None = None  # type: ignore[valid-type]
    dgrad: RecipeDgrad | None = None  # type: ignore[valid-type]
    wgrad: RecipeWgrad | None = None  # type: ignore[valid-type]


@dataclass
class PrecisionConfig:
    """A recipe, what it leaves out, and who computes it.

    ``rules``: by name, in their order; for each GEMM of a linear the last that matches wins. ``keep``
    comes before them, ``tail`` after them.
    ``deoscillation``: every ``period`` steps, weights that swing around a rounding boundary are set
    onto their cast.
    ``amax``: the per-tensor amax of an operand that tensor parallelism shards is all-reduced over
    the tensor-parallel group (``tensor_parallel``: the single process's numbers) or taken from the
    rank's own shard (``rank``: no collective).
    ``mxfp4_emulation``: what carries MXFP4 to tensor cores without FP4 (Hopper): ``fp8``, an E4M3
    under one power of two a row, at FP8's speed (metrics rows count what it could not hold exactly
    as ``mxfp4_inexact``), or ``bf16``, exact.
    """

    name: str = "bf16"
    fprop: RecipeFprop = field(default_factory=RecipeFprop)  # type: ignore[valid-type]
    dgrad: RecipeDgrad = field(default_factory=RecipeDgrad)  # type: ignore[valid-type]
    wgrad: RecipeWgrad = field(default_factory=RecipeWgrad)  # type: ignore[valid-type]
    keep: KeepConfig = field(default_factory=KeepConfig)  # type: ignore[valid-type]
    tail: TailConfig = field(default_factory=TailConfig)  # type: ignore[valid-type]
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    deoscillation: DeoscillationConfig = field(  # type: ignore[valid-type]
        default_factory=DeoscillationConfig
    )
    amax: str = "tensor_parallel"
    backend: str = "auto"
    mxfp4_emulation: str = "fp8"


_CLASSES: dict[str, Any] = {"fprop": Fprop, "dgrad": Dgrad, "wgrad": Wgrad}


def fill_rules(precision: PrecisionConfig, named: Callable[[str], Recipe]) -> None:
    """Write the GEMMs of every rule that names a recipe into it, so that the config says them all.

    Raises:
        UserError: naming the key, for a rule that says nothing to compute.
    """
    for name, rule in precision.rules.items():
        key = f"precision.rules.{name}"
        given = [gemm for gemm in GEMMS if getattr(rule, gemm) is not None]
        if rule.recipe is None and not given:
            raise UserError(
                f"{key}.recipe: the rule says nothing to compute; name a recipe (bf16, fp8, ...), "
                "or give fprop, dgrad or wgrad"
            )
        if not rule.gemms:
            rule.gemms = list(GEMMS) if rule.recipe is not None else given
        for gemm in rule.gemms:
            if gemm not in GEMMS:
                raise UserError(f"{key}.gemms: {gemm!r} is unknown; use {', '.join(GEMMS)}")
            if gemm in given:
                continue
            if rule.recipe is None:
                raise UserError(f"{key}.{gemm}: it is in gemms, but not given; give it, or recipe")
            try:
                setattr(rule, gemm, _thawed(named(rule.recipe).gemm(gemm)))
            except UserError as error:
                raise UserError(f"{key}.recipe: {error}") from None


def plan_from(precision: PrecisionConfig, num_layers: int, *, rules: bool = True) -> Plan:
    """The frozen Plan of a precision section for a model of ``num_layers`` blocks.

    ``rules`` False: the recipe alone, for every linear.

    Raises:
        UserError: naming the key, for what cannot be meant.
    """
    recipe = _recipe(precision, "precision")
    if not rules:
        return Plan(recipe, num_layers)
    return Plan(
        recipe=recipe,
        num_layers=num_layers,
        keep=_frozen(Keep, precision.keep),
        tail=_frozen(Tail, precision.tail),
        rules=tuple(_rule(name, rule) for name, rule in precision.rules.items()),
        deoscillation=_frozen(Deoscillation, precision.deoscillation),
    )


def _rule(name: str, rule: RuleConfig) -> Rule:
    key = f"precision.rules.{name}"
    if not rule.gemms:
        raise UserError(f"{key}.gemms: compose the config first, it fills the rules")
    chosen = {g: _gemm(_CLASSES[g], getattr(rule, g), f"{key}.{g}") for g in rule.gemms}
    try:
        recipe = Recipe(**chosen)
    except UserError as error:
        raise UserError(str(error).replace("precision.", f"{key}.", 1)) from None
    return Rule(
        name=name,
        recipe=recipe,
        gemms=tuple(rule.gemms),
        blocks=None if rule.blocks is None else str(rule.blocks),
        linears=tuple(rule.linears),
        modules=tuple(rule.modules),
        start=parse_point(f"{key}.start", rule.start),
        stop=parse_point(f"{key}.stop", rule.stop),
        trigger=parse_trigger(f"{key}.trigger", rule.trigger),
        release=parse_trigger(f"{key}.release", rule.release),
    )


def _recipe(node: Any, key: str) -> Recipe:
    return Recipe(**{g: _gemm(cls, getattr(node, g), f"{key}.{g}") for g, cls in _CLASSES.items()})


def _gemm(cls: type, node: Any, key: str) -> Any:
    values: dict[str, Any] = {"fast_accum": node.fast_accum}
    parts: dict[str, type] = dict.fromkeys(OPERANDS[cls.__name__.lower()], QuantSpec)
    for part, kind in (parts | {"rotation": Rotation}).items():
        try:
            values[part] = _frozen(kind, getattr(node, part))
        except UserError as error:
            text = str(error).removeprefix("rotation.")
            raise UserError(f"{key}.{part}.{text}") from None
    return cls(**values)


def _frozen(cls: type, node: Any) -> Any:
    """A frozen dataclass from its schema: lists become tuples."""
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _thawed(gemm: Any) -> Any:
    """A frozen GEMM as its schema."""

    def fill(schema: Any, frozen: Any) -> Any:
        for f in dataclasses.fields(frozen):
            value = getattr(frozen, f.name)
            if dataclasses.is_dataclass(value):
                fill(getattr(schema, f.name), value)
            else:
                setattr(schema, f.name, value)
        return schema

    schemas = {Fprop: RecipeFprop, Dgrad: RecipeDgrad, Wgrad: RecipeWgrad}
    return fill(schemas[type(gemm)](), gemm)
