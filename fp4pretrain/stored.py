"""A run's config as its folder holds it, and runs that are made from such a config."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fp4pretrain.config import RunConfig, completed, compose, schema_keys
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.naming import flat
from fp4pretrain.overrides import key_and_value, one_line, refuse_unknown
from fp4pretrain.presets import groups


def read_config(path: Path) -> RunConfig:
    """The config that a run's folder holds; keys it lacks have their defaults. Raises UserError."""
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{path}: no config.yaml; give the run_dir that a run wrote")
    return _read(file)


def composed(overrides: Sequence[str], stored: Path | None = None) -> RunConfig:
    """The checked config of overrides in Hydra's grammar: on the groups' files, or on a stored config,
    which has all of them already. Raises UserError."""
    if stored is None:
        return compose(overrides)
    if not stored.is_file():
        raise UserError(f"config: {stored} is no file; give a run's config.yaml")
    config = OmegaConf.structured(_read(stored))
    refuse_unknown(overrides, keys=schema_keys())
    for text in overrides:
        key, value = key_and_value(text)
        if key in groups() or key.startswith("precision."):
            raise UserError(
                f"{key}: {stored} says it already; leave it out, or leave --config out and compose anew"
            )
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            raise UserError(one_line(error, [text], keys=schema_keys())) from None
    made = OmegaConf.to_object(config)
    assert isinstance(made, RunConfig)
    given = {text.partition("=")[0] for text in overrides}
    if "train.steps" in given and "train.tokens" not in given:
        made.train.tokens = None
    return completed(made, given)


def _read(file: Path) -> RunConfig:
    try:
        tree = OmegaConf.load(file)
    except (OSError, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise _unreadable(str(file), error) from None
    return config_from(tree, str(file))


def config_from(tree: Any, where: str) -> RunConfig:
    """The config that a mapping of its sections says; keys it lacks have their defaults.

    Raises UserError, which names ``where`` it is from.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), tree)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise _unreadable(where, error) from None
    assert isinstance(config, RunConfig)
    return config


@cache
def defaults() -> dict[str, Any]:
    """Key -> value that a config has where it does not say the key, in the words of YAML."""
    tree: Any = OmegaConf.to_container(OmegaConf.structured(RunConfig))
    assert isinstance(tree, dict)
    return flat(tree)


def _unreadable(where: str, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(
        f"{where}: it is no config of this version ({reason}); use the version that wrote it"
    )
