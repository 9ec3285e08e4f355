"""A run's folder: made once, never overwritten.

runs/NAME/  config.yaml  plan.txt  data.json  metrics.jsonl  checkpoints/  wandb/
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path, write_text
from fp4pretrain.train import checkpoint

CHECKPOINTS = "checkpoints"


def run_path(config: RunConfig) -> Path:
    """``run_dir``, or ``runs/NAME`` with NAME from ``name`` or the recipe and seed."""
    if config.run_dir:
        return user_path(config.run_dir, key="run_dir")
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
    """Raises UserError where a run in this folder would overwrite another, or could not write.

    A folder that holds something is for the run that made it: ``resume=auto``, or a checkpoint out
    of it. A checkpoint of another run starts a new folder.
    """
    try:
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:  # a name too long for the file system
        raise _unwritable(path, error) from None
    if not nearest.is_dir():
        raise UserError(f"run_dir: {nearest} is a file; choose another run_dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {nearest} cannot be written; choose another run_dir")
    if not path.is_dir() or not any(path.iterdir()):
        return
    own = (path / CHECKPOINTS).is_dir()
    if resume is not None and own and (resume == "auto" or _within(Path(resume), path)):
        return
    cure = "continue it with resume=auto, or choose" if own and resume is None else "choose"
    holds = "exists already" if own else "holds other files than a run's"
    raise UserError(f"run_dir: {path} {holds}; {cure} another run_dir (or name)")


def prepare(path: Path, config: RunConfig, *, plan_text: str, unigram_entropy: float) -> None:
    """Make the folder with config.yaml, plan.txt and data.json (the validation text's unigram
    entropy, nats a token). Raises UserError where it cannot be written."""
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_text(path / "plan.txt", plan_text + "\n")
        data = {"unigram_entropy": unigram_entropy}
        write_text(path / "data.json", json.dumps(data) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def find_checkpoint(path: Path, config: RunConfig) -> Path | None:
    """The checkpoint to start from, None for a fresh start. Raises UserError where there is none
    that the run can go on from."""
    return checkpoint.find(path / CHECKPOINTS, config.resume, config=config)


def _within(path: Path, folder: Path) -> bool:
    return user_path(path, key="resume").resolve().is_relative_to(folder.resolve())


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir: {path} cannot be written ({error.strerror}); choose another run_dir"
    )
