"""From YAML and overrides to a checked ``RunConfig``, by Hydra.

YAML files in ``configs/`` fill the schema in and command-line overrides change it. An unknown key or value
fails here, while composing; nothing below this module imports Hydra.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fp4pretrain.checks import check, check_triggers
from fp4pretrain.config.sections import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import check_names
from fp4pretrain.naming import recipe_name
from fp4pretrain.overrides import (
    adding_rules,
    names_nothing,
    naming_files,
    one_line,
    parsed,
    refuse_unknown,
)
from fp4pretrain.precision import Plan, Recipe
from fp4pretrain.precision_config import PrecisionConfig, fill_rules, plan_from
from fp4pretrain.presets import config_dir, groups, offer, own, search_path
from fp4pretrain.units import tokens_of


@dataclass
class _LoosePrecision(PrecisionConfig):
    """While Hydra composes: it cannot add a rule to a map whose values have a type."""

    rules: dict[str, Any] = field(default_factory=dict)  # type: ignore[assignment]


@dataclass
class _LooseRun(RunConfig):
    precision: _LoosePrecision = field(default_factory=_LoosePrecision)


_store = ConfigStore.instance()
_store.store(name="schema", node=_LooseRun)
for _group in ("model", "data", "optim", "parallel", "train", "precision", "logging"):
    _store.store(group=_group, name="schema", node=type(getattr(_LooseRun(), _group)))


class _OwnConfigs(SearchPathPlugin):
    """Hydra looks into a user's own folders before it looks into ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(_own_folders()):
            search_path.prepend("own", f"file://{folder}", anchor="main")


def _own_folders() -> list[Path]:
    return [folder for folder in search_path() if folder != config_dir()]


Plugins.instance().register(_OwnConfigs)


def compose(overrides: Sequence[str]) -> RunConfig:
    """``configs/train.yaml`` with overrides in Hydra's grammar, as a checked RunConfig.

    A group takes an option's name or the path of a YAML file. Raises UserError, one line naming key and
    cure, for anything unknown or impossible. Checks that need the number of ranks are in
    ``fp4pretrain.model.layout``.
    """
    keys = schema_keys()
    overrides = naming_files(overrides)
    refuse_unknown(overrides, keys=keys)
    overrides = [text for text in overrides if not names_nothing(text)]
    composed, choices = _composed(tuple(overrides), keys, own())
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    given = {text.partition("=")[0] for text in overrides}
    if "precision" not in choices:
        raise UserError("precision: ~precision leaves no recipe; leave it out, or choose bf16")
    config.precision.name = recipe_name(
        asdict(config.precision),
        option=choices["precision"],
        experiment=choices.get("experiment"),
        plain=lambda override: _plain_recipe(override, keys, own()),
        given=given,
    )
    fill_rules(config.precision, lambda name: _named_recipe(name, own()))
    return completed(config, given)


def completed(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The config with its lengths in steps and tokens, checked. ``given``: keys that the user set.

    Raises UserError.
    """
    if config.train.tokens is not None:
        if "train.steps" in given and "train.tokens" in given:
            raise UserError("train.tokens: train.steps says another length; give one of them")
        total = tokens_of(config.train.tokens, key="train.tokens")
        a_step = config.train.global_batch * config.model.seq_length
        config.train.steps = -(-total // max(1, a_step))
    if config.data.valid_tokens is not None:
        config.data.valid_tokens = tokens_of(config.data.valid_tokens, key="data.valid_tokens")
    check(config)
    check_names(config.resume_with, schema_keys())
    check_triggers(config, plan_of(config))
    return config


@lru_cache(maxsize=64)  # one process asks for the same more than once
def _composed(
    overrides: tuple[str, ...], keys: frozenset[str], own: tuple[object, ...]
) -> tuple[Any, dict[str, Any]]:
    """The composed config under the schema, and the option chosen of every group. ``own``: which files
    of the user's there were to choose from. Raises UserError."""
    options, values = _parted(overrides)
    try:
        composed, choices = _by_hydra(options, own)
        composed = copy.deepcopy(composed)
        for override in values:
            OmegaConf.update(
                composed, override.key_or_group, override.value(), force_add=override.is_force_add()
            )
        sections = [f.name for f in dataclasses.fields(RunConfig)]
        composed = OmegaConf.masked_copy(composed, sections)
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        # Once more through the schema: an interpolation of a whole section is not checked before.
        merged = OmegaConf.merge(_schema(), plain)
        OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(one_line(error, list(overrides), keys=keys)) from None
    except RecursionError:
        raise UserError(
            f"{', '.join(overrides)}: the defaults of a file lead back to it; name another file there"
        ) from None
    return merged, choices


def _parted(overrides: Sequence[str]) -> tuple[tuple[str, ...], list[Override]]:
    """Overrides that choose an option of a group, as typed, and those that set keys, as Hydra reads them.

    Hydra parts them in the same way. Only the first decide which files are read.
    """
    offered = groups()
    options, values = [], []
    for text in adding_rules(overrides):
        override = parsed(text)
        if override.key_or_group in offered and not isinstance(override.value(), dict):
            options.append(text)
        else:
            values.append(override)
    return tuple(options), values


@lru_cache(maxsize=64)  # a third of a second each; overrides that only set keys share one
def _by_hydra(options: tuple[str, ...], own: tuple[object, ...]) -> tuple[Any, dict[str, Any]]:
    """The sections of the run with the chosen option of every group, and these options; no key is set yet.

    The result is shared: copy it before you change it. Raises what Hydra does.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = hydra_compose("train", overrides=list(options), return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return composed, choices


@cache
def _schema() -> Any:
    """The whole schema, which a merge copies."""
    return OmegaConf.structured(RunConfig)


@cache
def _plain_recipe(override: str, keys: frozenset[str], own: tuple[object, ...]) -> dict[str, Any]:
    """The precision section of a recipe's or experiment's file as it stands."""
    composed, _ = _composed((override,), keys, own)
    section: dict[str, Any] = OmegaConf.to_container(composed.precision)  # type: ignore[assignment]
    return section


@cache
def schema_keys() -> frozenset[str]:
    """Every key a user can set, dotted, with the sections themselves."""

    def below(node: Any, prefix: str) -> Iterator[str]:
        for f in dataclasses.fields(node):
            key = f"{prefix}{f.name}"
            yield key
            if dataclasses.is_dataclass(getattr(node, f.name)):
                yield from below(getattr(node, f.name), f"{key}.")

    return frozenset(below(RunConfig(), ""))


def plan_of(config: RunConfig) -> Plan:
    """The frozen Plan that the precision section describes."""
    return plan_from(config.precision, config.model.num_layers)


@cache
def _named_recipe(name: str, own: tuple[object, ...]) -> Recipe:
    """The recipe of an option of ``precision``; ``own``: as for ``_composed``."""
    offered = groups()["precision"]
    if name not in offered:
        raise UserError(f"{name!r} is no recipe; choose {offer(name, offered)}")
    composed, _ = _composed((f"precision={name}",), schema_keys(), own)
    precision = OmegaConf.to_object(composed.precision)
    assert isinstance(precision, PrecisionConfig)
    return plan_from(precision, 1_000, rules=False).recipe
