"""A run's folder: made once, never overwritten.

runs/NAME/  config.yaml  plan.txt  metrics.jsonl  checkpoints/  wandb/
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.train import checkpoint

CHECKPOINTS = "checkpoints"


def run_path(config: RunConfig) -> Path:
    """``run_dir``, or ``runs/NAME`` with NAME from ``name`` or the recipe and seed."""
    if config.run_dir:
        return Path(config.run_dir)
    return Path("runs") / (config.name or f"{config.precision.name}-seed{config.seed}")


def on_main(work: Callable[[], None], *, is_main: bool) -> None:
    """Run ``work`` on the main rank; every rank waits, and raises its UserError if it has one."""
    said: list[str | None] = [None]
    if is_main:
        try:
            work()
        except UserError as error:
            said[0] = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise UserError(said[0])


def check_free(path: Path, resume: str | None) -> None:
    """Raises UserError where the folder holds another run and ``resume`` is not asked for."""
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir: {path} is a file; choose another run_dir")
    if resume is None and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"run_dir: {path} exists already; continue it with resume=auto, or choose another "
            "run_dir (or name)"
        )


def prepare(path: Path, config: RunConfig, plan_text: str) -> None:
    """Make the folder with config.yaml and plan.txt. Raises UserError where it cannot be written."""
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        (path / "plan.txt").write_text(plan_text + "\n")
    except OSError as error:
        raise UserError(
            f"run_dir: {path} cannot be written ({error.strerror}); choose another run_dir"
        ) from None


def find_checkpoint(path: Path, resume: str | None) -> Path | None:
    """The checkpoint to start from, None for a fresh start."""
    return checkpoint.find(path / CHECKPOINTS, resume)
