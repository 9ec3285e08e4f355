"""A run's config and plan, as its folder holds them."""

from __future__ import annotations

from pathlib import Path

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
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(file))
        config = OmegaConf.to_object(merged)
    except (OSError, OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file}: it is no config of this version ({reason}); use the version that wrote it"
        ) from None
    assert isinstance(config, RunConfig)
    return config
