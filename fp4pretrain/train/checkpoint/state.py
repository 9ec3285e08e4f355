"""A trainer as boxes of whole tensors, and back, on any layout.

megatron-core says which box of which whole tensor each rank holds (``sharded_state_dict``): weights,
FP32 masters, Adam's moments, with layers under global numbers and SwiGLU's two halves apart. The
optimizer's state has the parameters' own shapes, so a checkpoint knows nothing of the layout that
wrote it. What is no tensor is a few numbers, in ``run.json``: Adam's step and the
schedule's. Everything else of an optimizer (learning rates, betas, decay) is the config's.

Rounding noise needs no state: its keys follow from the seed and the step. Dropout's generators do;
they belong to a place in the model-parallel grid and are restored where that grid is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from fp4pretrain.errors import UserError
from fp4pretrain.train.checkpoint.files import (
    Box,
    Damaged,
    Manifest,
    check_file,
    read_manifest,
    read_part,
)
from fp4pretrain.train.checkpoint.shards import leaf_of, shard_boxes
from fp4pretrain.train.trainer import Trainer, unwrapped

# Tells megatron-core to describe optimizer state as whole parameters, for any layout.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


_PATHS = "paths."


def collect(trainer: Trainer) -> tuple[list[Box], dict[str, Any]]:
    """Copies of what this rank stores, in host memory, and the numbers for ``run.json``.

    Of the distributed optimizer each rank stores its own shards, so nothing is gathered for a save.
    """
    state = _sharded(trainer, loading=False)
    boxes = [
        box
        for part in _parts(trainer.optimizer)
        if isinstance(part, DistributedOptimizer)
        for box in shard_boxes(part, state)
    ]
    apply_factories(state)
    boxes += [
        _box(leaf, trainer.world.device)
        for leaf in nested_values(state)
        if isinstance(leaf, ShardedTensor) and is_main_replica(leaf.replica_id)
    ]
    if trainer.world.data_rank == 0:
        boxes += [
            Box(key, tuple(generator.shape), (0,), generator.clone())
            for key, generator in _generators().items()
        ]
    numbers = {"optimizer_step": _adam_step(state), "schedule_step": trainer.schedule.num_steps}
    return boxes, numbers


def restore(
    trainer: Trainer,
    folder: Path,
    manifest: Manifest,
    *,
    numbers: dict[str, Any],
    agree: Callable[[str | None], None],
) -> None:
    """Weights, optimizer, schedule and generators from a checkpoint's files.

    ``agree`` is given the error of this rank's reading, or None, and raises on every rank if any rank has
    one. Until it returns the trainer is not usable.
    """
    trainer.settle()
    trainer.replays.forget()  # the optimizer's tensors are other ones after this
    # an open window's paths; a run that now asks for none lets them go
    stored = any(key.startswith(_PATHS) for key in manifest.tensors)
    trainer.paths.open = []
    if stored and trainer.binding.plan.deoscillation:
        trainer.paths.begin()
    state = _sharded(trainer, loading=True)
    loaded, own, factories = load_preprocess(state)
    problem = None
    try:
        loaded = _filled(loaded, partial(_stored_part, folder, manifest))
        generators = _stored_generators(folder, manifest)
    except Damaged as damage:
        problem = str(damage)
    agree(problem)
    merge(loaded, own)
    loaded = apply_factory_merges(loaded, factories)
    for index, chunk in enumerate(trainer.chunks):
        unwrapped(chunk).load_state_dict(loaded[_model_key(trainer, index)], strict=True)
    if trainer.paths.open:
        trainer.paths.begin()  # at the weights that were loaded
        for (_, tensors), found in zip(trainer.paths.sums(), loaded["paths"], strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(found[name])
    _set_adam_step(loaded["optimizer"], numbers["optimizer_step"])
    with _torch_adam_steps(trainer.optimizer):
        trainer.optimizer.load_state_dict(loaded["optimizer"])
    trainer.schedule.num_steps = numbers["schedule_step"]
    trainer.schedule.step(increment=0)  # the learning rate of that step, in the config's schedule
    _set_generators(generators)


def restore_weights(gpt: Any, folder: Path) -> None:
    """The weights alone of a checkpoint of any layout, into this rank's model in their dtype.

    Raises UserError where a file is damaged.
    """
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.files):
            check_file(folder, name, manifest)
        fill_weights(gpt, partial(_stored_part, folder, manifest))
    except Damaged as damage:
        raise UserError(f"{folder} is damaged ({damage}); take another checkpoint") from None


def fill_weights(gpt: Any, part: Callable[[ShardedTensor], torch.Tensor]) -> None:
    """Give every tensor of this rank's model what ``part`` says of it: a tensor of its shape."""
    metadata = _METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    with _quiet():
        state = {"model": gpt.sharded_state_dict(metadata=metadata)}
    loaded, own, factories = load_preprocess(state)
    loaded = _filled(loaded, part)
    merge(loaded, own)
    gpt.load_state_dict(apply_factory_merges(loaded, factories)["model"], strict=True)


def _sharded(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    metadata = _METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    state: dict[str, Any] = {}
    with _quiet():
        for index, chunk in enumerate(trainer.chunks):
            key = _model_key(trainer, index)
            state[key] = unwrapped(chunk).sharded_state_dict(metadata=metadata)
        models = dict(state)
        if trainer.paths.open:
            state["paths"] = _sharded_paths(trainer, models)
        parts = _parts(trainer.optimizer)
        if not loading and all(isinstance(part, DistributedOptimizer) for part in parts):
            state["optimizer"] = {i: part.state_dict() for i, part in enumerate(parts)}
            return state
        state["optimizer"] = trainer.optimizer.sharded_state_dict(
            models.get("model", models), is_loading=loading, metadata=metadata
        )
    return state


def _sharded_paths(trainer: Trainer, models: dict[str, Any]) -> list[dict[str, Any]]:
    leaves = leaf_of(models)
    return [
        {
            name: make_sharded_optimizer_tensor(leaves[id(parameter)], tensor, f"{_PATHS}{name}")
            for name, tensor in tensors.items()
        }
        for parameter, tensors in trainer.paths.sums()
    ]


def _model_key(trainer: Trainer, index: int) -> str:
    return "model" if len(trainer.chunks) == 1 else f"model{index}"


def _key(leaf: ShardedTensor) -> str:
    """The plain optimizer calls its masters otherwise than the distributed one does."""
    return leaf.key.replace("optimizer.state.fp32_param.", "optimizer.state.param.")


def _box(leaf: ShardedTensor, device: torch.device) -> Box:
    """A copy, with the axes (the layer's number) that a rank's own tensor does not have. A tensor
    in host memory, while the run is on a GPU, was gathered for this save alone, so it is not copied."""
    live = leaf.data.device.type == device.type
    data = leaf.data.detach().to("cpu", copy=live)
    data = data.reshape((1,) * leaf.prepend_axis_num + tuple(leaf.local_shape))
    return Box(_key(leaf), tuple(leaf.global_shape), tuple(leaf.global_offset), data)


def _filled(node: Any, part: Callable[[ShardedTensor], torch.Tensor]) -> Any:
    """The same tree with ``part`` of each tensor's description in its place."""
    if isinstance(node, dict):
        return {key: _filled(value, part) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, part) for value in node]
    if isinstance(node, ShardedObject):
        return node.data  # extra states of linears, which hold none
    return part(node) if isinstance(node, ShardedTensor) else node


def _stored_part(folder: Path, manifest: Manifest, node: ShardedTensor) -> torch.Tensor:
    """What a checkpoint has of it. Raises Damaged."""
    stored = manifest.tensors.get(_key(node))
    if stored is None:
        raise Damaged(f"{node.key} is not in it")
    same = len(stored.shape) == len(node.global_shape) and stored.dtype == node.dtype
    if not same or (stored.shape != node.global_shape and not node.allow_shape_mismatch):
        raise Damaged(
            f"{node.key} is {stored.dtype} {list(stored.shape)} there and {node.dtype} "
            f"{list(node.global_shape)} here"
        )
    node.init_data("cpu")
    out = node.data.detach().view((1,) * node.prepend_axis_num + tuple(node.local_shape))
    read_part(folder, stored, offset=tuple(node.global_offset), out=out)
    return node.data


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _states(state: dict) -> list[dict]:
    """The state of each of an optimizer's parts; several are under their numbers."""
    return list(state.values()) if all(isinstance(key, int) for key in state) else [state]


def _adam_step(state: dict[str, Any]) -> float:
    """Updates that Adam has made. Fewer than the run's steps where a guard skipped some."""
    for part in _states(state["optimizer"]):
        inner = part.get("optimizer", part)
        steps = [group["step"] for group in inner["param_groups"] if "step" in group]
        steps.append(inner.get("state", {}).get("common_step"))
        if steps[0] is not None:
            return float(steps[0])
    return 0.0


def _set_adam_step(state: dict[str, Any], step: float) -> None:
    for part in _states(state):
        inner = part.get("optimizer", part)
        groups = inner["param_groups"]
        # the distributed optimizer and fused optimizers keep the step in their parameter groups
        if "param_state" in part or any("step" in group for group in groups):
            for group in groups:
                # torch counts in floats; Transformer Engine and apex in ints
                group["step"] = type(group.get("step", 0))(step)
        else:
            inner["state"]["common_step"] = torch.tensor(step)


def _generators() -> dict[str, torch.Tensor]:
    """Dropout's generators of this place in the grid, by the name they are stored under."""
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_rank()
    grid = (
        f"{parallel_state.get_pipeline_model_parallel_world_size()}x"
        f"{parallel_state.get_tensor_model_parallel_world_size()}"
    )
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        if isinstance(state, torch.Generator):
            state = state.get_state()
        if isinstance(state, torch.Tensor):
            found[f"tracker.{name}"] = state
    return {f"rng.{grid}.{pipeline}.{tensor}.{name}": state for name, state in found.items()}


def _stored_generators(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    found = {}
    for key, now in _generators().items():
        stored = manifest.tensors.get(key)
        if stored is not None and stored.shape == tuple(now.shape):
            found[key.split(".", 4)[-1]] = torch.empty_like(now, device="cpu")
            read_part(folder, stored, offset=(0,), out=found[key.split(".", 4)[-1]])
    return found


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    tracked = dict(get_cuda_rng_tracker().get_states())
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda":
            torch.cuda.set_rng_state(state)
        else:
            name = name.removeprefix("tracker.")
            generator = tracked.get(name)
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            else:
                tracked[name] = state
    get_cuda_rng_tracker().set_states(tracked)


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
    """Only errors from megatron-core's checkpoint logger: it warns on every save."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
