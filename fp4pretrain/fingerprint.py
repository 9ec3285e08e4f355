"""What shapes a run's curve, as values and as digests: two runs of one fingerprint are one experiment.

Every key of the config is in one of four places, and a test holds that for each of them:

- ``HARMLESS``: it shapes nothing, for the reason given there.
- ``BY_CONTENT``: what it names counts, not the name. Digests of the text and of the order in which it
  is read (``data.order``) and of the validation sets (``data.validation``) stand for it.
- ``precision``: the plan. It has a digest of its own, so that one can ask whether two runs differ in
  their recipe alone.
- everything else is an entry of the fingerprint, under its own name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from fp4pretrain.checks import schedule_steps
from fp4pretrain.errors import UserError
from fp4pretrain.naming import NOT_THE_RECIPE, flat
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.precision import GEMMS, Plan

if TYPE_CHECKING:
    from fp4pretrain.config import RunConfig

HARMLESS = {
    "name": "what the run is called",
    "run_dir": "where it is kept",
    "resume": "how this process began; what it began with is compared",
    "resume_with": "what was allowed to differ; what did is in the history",
    "baseline": "another run, trained before this one",
    "sweep": "when and where a command starts its runs",
    "logging": "who is told, not what",
    "profile": "watches steps and changes none",
    "observe": "measures casts and changes none",
    "checkpoint": "copies the state and leaves it alone",
    "guard": "acts in trouble only; what it did is in the rows, and its limits are raised to go on",
    "parallel": "another layout or device adds in another order and computes the same",
    "train.tokens": "turned into train.steps",
    "train.log_interval": "over how many steps a row's mean is taken",
    "train.graph": "a captured step computes the same bits",
    "train.deterministic": "adds in a fixed order where the order is anyone's",
    "train.fusion": "rounds once where several kernels round between them",
    "train.packed_weights": "expanded for a GEMM they are the same numbers",
    "train.eval_interval": "evaluation changes no state",
    "train.eval_bf16": "evaluation changes no state",
    "data.cache_dir": "where copies lie",
    "data.workers": "who reads the same",
    "precision.name": "the plan decides what a recipe is",
    "precision.backend": "who computes the same recipe",
}
# Keys whose content is in the order of the training data, and in the validation sets.
ORDER, VALIDATION = "data.order", "data.validation"
_TEXT = ("data.path", "data.tokenizer", "data.split", "data.mock", "data.valid")
# Fields of QuantSpec that came later, and the values that change nothing.
_LATER_FIELDS = {
    name: getattr(QuantSpec, name)
    for name in ("source", "split", "channels", "amax", "amax_value", "amax_steps")
}
# Keys that came later, and the values that change nothing: fingerprints of earlier runs lack them.
_LATER_KEYS: dict[str, Any] = {
    "model.implementation": "fp4pretrain",
    "data.document_mask": False,
    "data.reset_positions": False,
    "data.eod_mask_loss": False,
}
BY_CONTENT = {
    ORDER: (*_TEXT, "data.seed"),
    VALIDATION: (*_TEXT, "data.valid_tokens"),
}


def entries(config: RunConfig) -> dict[str, Any]:
    """Key -> value of all that shapes the curve but the recipe and the data's content."""
    by_content = {key for keys in BY_CONTENT.values() for key in keys}
    found = {
        key: value
        for key, value in flat(asdict(config)).items()
        if not (within(key, HARMLESS) or within(key, by_content) or key.startswith("precision."))
    }
    for key, silent in _LATER_KEYS.items():
        if found[key] == silent:
            del found[key]
    found["data.seed"] = data_seed(config)
    found["optim.warmup"], found["optim.decay"] = schedule_steps(config)
    if config.optim.schedule == "cosine":  # which knows no stable part
        found["optim.decay"] = found["optim.decay_shape"] = None
    return found


def data_seed(config: RunConfig) -> int:
    """The seed of the order of the training data."""
    return config.seed if config.data.seed is None else config.data.seed


def recipe_entries(config: RunConfig) -> dict[str, Any]:
    """Key -> value of the precision section, without keys that do not change the recipe."""
    found = flat(asdict(config.precision), "precision.")
    return {key: value for key, value in found.items() if key not in NOT_THE_RECIPE}


def plan_digest(config: RunConfig, plan: Plan) -> str:
    """A digest of what every linear computes and when: equal for equal plans, whatever they are called."""
    p = config.precision
    rules = [
        {
            "linears": [place for place in plan.linears() if rule.covers(*place, plan.num_layers)],
            "gemms": {gemm: _digested(rule.recipe.gemm(gemm)) for gemm in sorted(rule.gemms)},
            "when": [str(rule.start), str(rule.stop), *_triggers(rule)],
        }
        for rule in plan.ordered
    ]
    facts = {
        "recipe": {gemm: _digested(plan.recipe.gemm(gemm)) for gemm in GEMMS},
        "rules": rules,
        # a shard's own amax makes the layout a part of what is computed
        "amax": p.amax if p.amax == "tensor_parallel" else [p.amax, config.parallel.tensor],
        "mxfp4_emulation": p.mxfp4_emulation,
    }
    if plan.deoscillation:
        facts["deoscillation"] = asdict(plan.deoscillation)
    return digest(facts)


def _triggers(rule: Any) -> list[str]:
    return [] if rule.trigger is None else [str(rule.trigger), str(rule.release)]


def _digested(gemm: Any) -> dict[str, Any]:
    """A GEMM's fields. Fields that were added later are left out where they have their defaults, so that
    plans of earlier runs keep their digests."""
    found = asdict(gemm)
    for operand in found.values():
        for key, silent in _LATER_FIELDS.items():
            if isinstance(operand, dict) and operand.get(key) == silent:
                del operand[key]
    return found


def digest(facts: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of anything that JSON can hold."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def within(key: str, prefixes: Collection[str]) -> bool:
    """Whether a key is one of the prefixes or inside a section that is."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (then, now) of every key whose value is another, or that one of the two lacks. A key that came
    later has the value that changes nothing where it is left out."""
    both = {
        key: (then.get(key, _LATER_KEYS.get(key)), now.get(key, _LATER_KEYS.get(key)))
        for key in sorted(then.keys() | now.keys())
    }
    return {key: (a, b) for key, (a, b) in both.items() if a != b}


def digests(data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint's ``data`` that makes runs differ: digests, those of validation sets by
    name."""
    sets = {name: one["digest"] for name, one in data[VALIDATION].items()}
    return {ORDER: data[ORDER], VALIDATION: sets}


def check_names(names: Sequence[str], schema: Collection[str]) -> None:
    """Raises UserError for a name in ``resume_with`` that decides nothing."""
    named = {key for key in schema if not within(key, HARMLESS)} | set(BY_CONTENT)
    for name in names:
        if name not in named:
            near = get_close_matches(name, sorted(named), n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"resume_with: {name!r} is nothing that a checkpoint is held to; {meant}name keys or "
                "sections such as [optim.lr,precision]"
            )


def covered(key: str, names: Sequence[str]) -> bool:
    """Whether ``resume_with`` names a key, its section, or, for content, a key that decides it."""
    return within(key, names) or any(name in BY_CONTENT.get(key, ()) for name in names)


def whole(config: RunConfig, plan: Plan, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a run folder and every checkpoint record.

    ``data``: ``data.order`` a digest, ``data.validation`` name -> digest, tokens, sequences. ``digest``
    covers entries and data, ``plan`` the recipe.
    """
    found = entries(config)
    return {
        "digest": digest([found, data]),
        "plan": plan_digest(config, plan),
        "seeds": {"seed": config.seed, "data.seed": data_seed(config)},
        "entries": found,
        "precision": recipe_entries(config),
        "data": dict(data),
    }
