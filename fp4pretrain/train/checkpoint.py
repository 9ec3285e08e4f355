"""Checkpoints in megatron-core's distributed format, and which one is the latest.

    checkpoints/
      step_00000100/      model, optimizer and schedule shards, and run.json
      latest              the name of the newest complete checkpoint

A checkpoint is written under a temporary name, renamed when every rank has finished, and only then
named in ``latest`` (written beside it and renamed too), so what ``latest`` names is complete. Noise
needs no saved state: its keys follow from the seed and the step. Weights and optimizer state are
stored whole-tensor-wise ("fully reshardable"), so another layout can read them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.train.trainer import Trainer, unwrapped

LATEST = "latest"
_RUN = "run.json"
_DESCRIBED = {
    "step": int, "consumed_samples": int, "skipped_samples": int, "memory": dict, "model": dict
}  # fmt: skip
_PARTS = ("common.pt", "metadata.json", ".metadata")  # megatron-core's, beside the shards
# Tells megatron-core to store optimizer state as whole parameters, readable by any layout.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def save(trainer: Trainer, folder: Path, *, keep_last: int) -> Path:
    """Write ``folder/step_N`` and make it the latest; older ones than ``keep_last`` are removed.

    Collective: every rank calls it. Raises OSError where the disk does.
    """
    name = f"step_{trainer.step:08d}"
    partial, final = folder / f".{name}.partial", folder / name
    if trainer.world.is_main:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with _quiet():
        dist_checkpointing.save(_state(trainer, loading=False), str(partial))
    dist.barrier()
    if trainer.world.is_main:
        (partial / _RUN).write_text(json.dumps(_description(trainer), indent=1))
        os.replace(partial, final)
        _write_latest(folder, name)
        for old in _complete(folder)[:-keep_last]:
            shutil.rmtree(folder / old)
    dist.barrier()
    return final


def find(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that ``resume`` names: None, ``auto`` (the latest, if any) or a path.

    Raises UserError for a path that is no checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        latest = folder / LATEST
        return folder / latest.read_text().strip() if latest.is_file() else None
    path = Path(resume).expanduser()
    if (path / folder.name).is_dir():
        path = path / folder.name  # a run's folder stands for its checkpoints
    if (path / LATEST).is_file():
        path = path / (path / LATEST).read_text().strip()
    if not (path / _RUN).is_file():
        raise UserError(f"resume: {resume} is no checkpoint; give auto or a .../step_N folder")
    return path


def described(path: Path) -> dict[str, Any]:
    """What ``run.json`` of a checkpoint says: step, consumed_samples, the model and the seed.

    Raises UserError where it is missing or damaged.
    """
    try:
        found = json.loads((path / _RUN).read_text())
        for part in _PARTS:
            (path / part).stat()
        for key, kind in _DESCRIBED.items():
            if not isinstance(found[key], kind):
                raise TypeError(key)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"resume: {path} is damaged ({_reason(error)}); resume from another checkpoint"
        ) from None
    return dict(found)


def _reason(error: Exception) -> str:
    lost = Path(error.filename).name if isinstance(error, OSError) and error.filename else _RUN
    return f"{lost}: {type(error).__name__}"


def check_model(path: Path, config: RunConfig) -> dict[str, Any]:
    """``described`` of a checkpoint of this model. Raises UserError for a checkpoint of another."""
    found = described(path)
    for key, value in asdict(config.model).items():
        if found["model"].get(key) != value:
            raise UserError(
                f"resume: {path} holds another model (model.{key} is {found['model'].get(key)} "
                f"there and {value} here); set model.{key} or resume another run"
            )
    return found


def load(trainer: Trainer, path: Path) -> None:
    """Continue from a checkpoint: weights, optimizer, schedule and step.

    Raises UserError for a checkpoint of another model.
    """
    found = check_model(path, trainer.config)
    _allocate(trainer.optimizer)
    try:
        with _quiet():
            state = dist_checkpointing.load(_state(trainer, loading=True), str(path))
    except (CheckpointingException, CheckpointException, OSError) as error:
        raise UserError(
            f"resume: {path} is damaged ({type(error).__name__}); resume from another checkpoint"
        ) from None
    for index, chunk in enumerate(trainer.chunks):
        unwrapped(chunk).load_state_dict(state[_model_key(trainer, index)], strict=True)
    with _torch_adam_steps(trainer.optimizer):
        trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.schedule.load_state_dict(state["schedule"])
    _set_rng(state["rng"])
    trainer.step = found["step"]
    trainer.consumed_samples = found["consumed_samples"]
    trainer.skipped_samples = found["skipped_samples"]
    trainer.memory = found["memory"]
    trainer.clock.weights_changed()


def _allocate(optimizer: Any) -> None:
    """Give a fresh optimizer the state that loading fills: a step on zero gradients.

    Without apex or Transformer Engine, megatron-core's distributed optimizer reads its step count
    from that state. The masters that the step decays are loaded over.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


def _state(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    metadata = _METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    state: dict[str, Any] = {}
    for index, chunk in enumerate(trainer.chunks):
        key = _model_key(trainer, index)
        state[key] = unwrapped(chunk).sharded_state_dict(metadata=metadata)
    models = dict(state)
    state["optimizer"] = trainer.optimizer.sharded_state_dict(
        models.get("model", models), is_loading=loading, metadata=metadata
    )
    state["schedule"] = trainer.schedule.state_dict()
    state["rng"] = _rng()
    return state


def _model_key(trainer: Trainer, index: int) -> str:
    return "model" if len(trainer.chunks) == 1 else f"model{index}"


def _rng() -> dict[str, torch.Tensor]:
    """Dropout's generators. The same on every rank of a data-parallel replica."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _description(trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    return {
        "step": trainer.step,
        "consumed_samples": trainer.consumed_samples,
        "skipped_samples": trainer.skipped_samples,
        "memory": trainer.memory,
        "model": asdict(config.model),
        "precision": config.precision.name,
        "parallel": asdict(config.parallel),
        "seed": config.seed,
    }


def _complete(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step_*") if (p / _RUN).is_file())


def _write_latest(folder: Path, name: str) -> None:
    temporary = folder / f".{LATEST}"
    temporary.write_text(name + "\n")
    os.replace(temporary, folder / LATEST)


@contextmanager
def _torch_adam_steps(optimizer: Any) -> Iterator[None]:
    """megatron-core's reader of fully reshardable state passes over torch Adam's ``step``, which its
    setter then misses (Transformer Engine's and apex's Adam keep none). The step is restored before
    from the parameter groups; here the setter is handed that one."""
    shards = getattr(optimizer, "chained_optimizers", [optimizer])
    shards = [o for o in shards if hasattr(o, "_set_main_param_and_optimizer_states")]
    for shard in shards:
        shard._set_main_param_and_optimizer_states = partial(_set_with_step, shard)
    try:
        yield
    finally:
        for shard in shards:
            del shard._set_main_param_and_optimizer_states


def _set_with_step(shard: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    group, order = shard.model_param_group_index_map[model_param]
    main_param = shard.optimizer.param_groups[group]["params"][order]
    state = shard.optimizer.state[main_param]
    if "step" in state:
        # restored as ONE tensor that all parameters share: each would count the others' steps too
        state["step"] = state["step"].clone()
        tensors["step"] = state["step"]
    type(shard)._set_main_param_and_optimizer_states(shard, model_param, tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from megatron-core's and torch's checkpoint loggers: they warn on every save."""
    loggers = [logging.getLogger(n) for n in ("megatron.core", "torch.distributed.checkpoint")]
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*ShardedTensor.*")
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
