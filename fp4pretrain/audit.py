"""What every linear of a run will really compute, and whether it did.

``audit`` resolves a config as a run would on the device at hand: formats, rounding, rotations, the
backend and its instruction for each GEMM of each linear, the share of the FLOPs in each precision, the
rules and the switches to come. ``done`` holds what was cast against the plan, after a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from fp4pretrain.config import ModelConfig, RunConfig, plan_of
from fp4pretrain.costs import flop_shares
from fp4pretrain.errors import UserError
from fp4pretrain.ops import Backend, choose
from fp4pretrain.precision import GEMMS, OPERANDS, Plan, Progress, Recipe
from fp4pretrain.precision.rules import HEAD, Rule, linear_name


def audit(
    config: RunConfig, device: torch.device, *, chosen: tuple[Backend, str] | None = None
) -> dict[str, Any]:
    """What a config computes at its start, as JSON values (README, "Is FP4 really on?").

    Args:
        chosen: a backend and the line that says why, where they are chosen already.

    Raises:
        UserError: where a rule matches nothing, nothing is quantized that should be, or no backend
            runs the recipe here; for linears that are not ours.
    """
    if config.model.implementation != "fp4pretrain":
        raise UserError(
            f"model.implementation: {config.model.implementation} shows no casts to audit; use "
            "model.implementation=fp4pretrain"
        )
    plan, p = plan_of(config), config.precision
    if chosen is None:
        chosen = choose(p.backend, plan, device, mxfp4_emulation=p.mxfp4_emulation)
    backend, choice = chosen
    start = Progress()
    return {
        "name": p.name,
        "device": device.type,
        "backend": choice,
        "linears": [_linear(plan, backend, device, layer, name) for layer, name in plan.linears()],
        "flops": flop_categories(plan, config.model),
        "rules": [_rule(rule, plan) for rule in plan.ordered],
        "switches": [_switch(rule, plan, config, start) for rule in plan.ordered if rule.timed],
        "deoscillation": str(plan.deoscillation) if plan.deoscillation else None,
        "never_quantized": [
            linear_name(*place)
            for place in plan.linears()
            if place[1] != HEAD and not any(r.quantized for r in plan.recipes_of(*place))
        ],
    }


def _linear(
    plan: Plan, backend: Backend, device: torch.device, layer: int | None, name: str
) -> dict[str, Any]:
    recipe = plan.at(layer, name, Progress())
    return {
        "name": linear_name(layer, name),
        "layer": layer,
        "gemms": {gemm: _gemm(recipe, gemm, backend, device) for gemm in GEMMS},
    }


def _gemm(recipe: Recipe, gemm: str, backend: Backend, device: torch.device) -> dict[str, Any]:
    chosen = recipe.gemm(gemm)
    found: dict[str, Any] = {}
    for operand, spec in zip(OPERANDS[gemm], chosen.specs, strict=True):
        found[operand] = asdict(spec)
    return {
        **found,
        "rotation": asdict(chosen.rotation),
        "fast_accum": chosen.fast_accum,
        "backend": backend.name,
        "instruction": backend.instruction(chosen, device),
    }


def flop_categories(
    plan: Plan, model: ModelConfig, *, holding: Mapping[str, bool] | None = None
) -> dict[str, float]:
    """``costs.flop_shares`` by fp4, fp8 (6 bits go at its speed) and bf16."""
    shares = flop_shares(plan, model, holding=holding)
    found = dict.fromkeys(("fp4", "fp8", "bf16"), 0.0)
    for label, share in shares.items():
        bits = 16 if label == "BF16" else int(label.split()[0])
        found["fp4" if bits <= 4 else "fp8" if bits <= 8 else "bf16"] += share
    return found


def _rule(rule: Rule, plan: Plan) -> dict[str, Any]:
    covered = [place for place in plan.linears() if rule.covers(*place, plan.num_layers)]
    return {
        "key": rule.key,
        "linears": [linear_name(*place) for place in covered],
        "gemms": list(rule.gemms),
        **_when(rule),
        "recipe": rule.recipe.label(),
    }


def _when(rule: Rule) -> dict[str, str | None]:
    """What begins and ends a rule, in words; None where nothing does."""
    parts = {key: getattr(rule, key) for key in ("start", "stop", "trigger", "release")}
    return {key: None if part is None else str(part) for key, part in parts.items()}


def _switch(rule: Rule, plan: Plan, config: RunConfig, start: Progress) -> dict[str, Any]:
    """The rule's effect on the shares of FLOPs where it alone of the timed rules holds."""
    only = {other.name: other is rule or not other.timed for other in plan.ordered}
    return {
        "rule": rule.key,
        "holds_at_start": rule.active(start),
        **_when(rule),
        "flops": flop_categories(plan, config.model, holding=only),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The audit as text: linears that compute alike are one line."""
    groups: dict[str, list[str]] = {}
    for linear in found["linears"]:
        groups.setdefault(_text(linear["gemms"]), []).append(linear["name"])
    told = [found["backend"], ""]
    for text, names in groups.items():
        told += [f"{len(names)} linears: {_short(names)}", text, ""]
    told.append("FLOPs: " + _shares(found["flops"]) + " (attention and head are in it)")
    for rule in found["rules"]:
        when = "".join(f", {word} {rule[key]}" for key, word in _WHEN.items() if rule[key])
        told.append(f"{rule['key']}: {len(rule['linears'])} linears, {rule['recipe']}{when}")
    for switch in found["switches"]:
        told.append(f"switch {switch['rule']}: FLOPs then " + _shares(switch["flops"]))
    if found["deoscillation"]:
        told.append(found["deoscillation"])
    return told


def _text(gemms: Mapping[str, Any]) -> str:
    rows = []
    for gemm, one in gemms.items():
        cells = []
        for operand in OPERANDS[gemm]:
            spec = one[operand]
            words = [spec["format"]]
            if spec["format"] != "bf16":
                words += [spec["block"], spec["rounding"], spec["scale"]]
                words += [f"{k} {spec[k]}" for k, usual in _USUAL.items() if spec[k] != usual]
            cells.append(f"{operand} {' '.join(words)}")
        turned = one["rotation"]
        kind = "" if turned["kind"] == "none" else f", {turned['kind']} {turned['size']}"
        rows.append(f"  {gemm}  {' · '.join(cells)}{kind}  [{one['instruction']}]")
    return "\n".join(rows)


_WHEN = {"start": "from", "stop": "until", "trigger": "once", "release": "until"}
_USUAL = {"source": "tensor", "split": "none", "amax": "current"}


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]}"


def _shares(flops: Mapping[str, float]) -> str:
    return ", ".join(f"{name.upper()} {share:.1%}" for name, share in flops.items())


def _in_tiles(recipe: Recipe) -> bool:
    """Whether dgrad's w may be fprop's, transposed."""
    return recipe.dgrad.w == recipe.fprop.w and recipe.dgrad.w.tiled


def done(binding: Any) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """What this rank's linears did while training, held against the recipes that they were given.

    Args:
        binding: the model's ``PlanBinding``.

    Returns:
        casts by format, products by the formats of their operands, and one clause for each site where
        a format was cast that no recipe asked for, or one that was asked for never was.
    """
    seen: dict[tuple[int, int, str, str], set[str]] = {}
    casts: Counter[str] = Counter()
    for (site, format_), count in binding.sites.cast.items():
        casts[format_] += count
        if site is not None:
            key = site.layer, site.linear, site.gemm, site.operand
            seen.setdefault(key, set()).add(format_)
    products: Counter[str] = Counter()
    for (_, first, second), count in binding.sites.multiplied.items():
        products[f"{first} x {second}"] += count
    wrong = []
    for layer, name, linear in binding.linears:
        bound = linear.bound
        recipes = binding.followed.get((layer, name), ())
        for gemm, operand in ((g, o) for g in GEMMS for o in OPERANDS[g]):
            asked = {recipe.operand(gemm, operand).format for recipe in recipes}
            found = seen.get((bound.layer, bound.linear, gemm, operand), set())
            if (gemm, operand) == ("dgrad", "w"):  # in tiles, fprop's cast serves its transpose too
                fprop = seen.get((bound.layer, bound.linear, "fprop", "w"), set())
                found = found | (fprop & {r.dgrad.w.format for r in recipes if _in_tiles(r)})
            if found != asked:
                wrong.append(
                    f"{linear_name(layer, name)} {gemm} {operand}: the plan says "
                    f"{' and '.join(sorted(asked)) or 'nothing'}, cast was "
                    f"{' and '.join(sorted(found)) or 'nothing'}"
                )
    return dict(casts), dict(products), wrong
