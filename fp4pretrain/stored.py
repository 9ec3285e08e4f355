"""A run's config and plan, as its folder holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError


def read_config(path: Path) -> RunConfig:
    """The config that a run's folder holds; keys it lacks have their defaults. Raises UserError."""
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{path}: no config.yaml; give the run_dir that a run wrote")
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


def _unreadable(where: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{where}: it is no config of this version ({reason}); use the version that wrote it"
    )
