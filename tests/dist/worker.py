"""One rank of a test: a process that runs jobs from stdin, one JSON object a line.

Importing torch and megatron-core costs seconds, forming groups costs milliseconds. So the processes
stay, and every test forms groups of its own among the first few of them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

warnings.filterwarnings("ignore")

import fp4pretrain  # noqa: F401  first of all: megatron-core then comes without PyTorch's compiler

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from started import started

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.groups import leave
from fp4pretrain.train.guard.update import StepHealth
from fp4pretrain.train.main import train
from fp4pretrain.train.step import evaluate, train_step
from fp4pretrain.train.trainer import Trainer, unwrapped


def first_steps(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Loss and grad norm of the first steps; the whole gradients of the first go to ``out``."""
    trainer = started(overrides, device)
    return steps_from(trainer, out, steps=steps)


def each_recipe(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """``first_steps`` of every recipe of ``precision=a,b``, in folders of their names: on GPUs forming groups
    takes longer than the steps, and here recipes share them."""
    (named,) = (text for text in overrides if text.startswith("precision="))
    rows = {}
    for recipe in named.removeprefix("precision=").split(","):
        run = [f"precision={recipe}" if text == named else text for text in overrides]
        folder = Path(out) / recipe
        folder.mkdir(exist_ok=True)
        rows[recipe] = first_steps(run, str(folder), steps=steps, device=device)["rows"]
    return {"recipes": rows}


def nudged_steps(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """``first_steps`` from weights that are moved by a last bit or so: what rounding alone can do."""
    trainer = started(overrides, device)
    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1 + 2.0**-23)
    return steps_from(trainer, out, steps=steps)


def steps_from(trainer: Trainer, out: str, *, steps: int) -> dict[str, Any]:
    """Rows of the next steps; the whole gradients of the first go to ``out``."""
    iterators = trainer.batches(0)
    rows = []
    for step in range(steps):
        trainer.binding.apply(trainer.progress)
        found: dict[str, torch.Tensor] = {}
        with _gradients_into(found, trainer) if step == 0 else nullcontext():
            rows.append(train_step(trainer, iterators))
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        if found and tensor_rank == 0 and trainer.world.data_rank == 0:
            stage = parallel_state.get_pipeline_model_parallel_rank()
            torch.save(found, Path(out) / f"gradients_stage{stage}.pt")
    return {"rows": rows}


@contextmanager
def _gradients_into(found: dict[str, torch.Tensor], trainer: Trainer) -> Iterator[None]:
    """Copy the whole gradients of a step before its update; not around a step that is captured."""
    update = trainer.optimizer.update

    def copy_then_update(health: StepHealth) -> torch.Tensor:
        found.update(whole_gradients(trainer))
        return update(health)

    with patch.object(trainer.optimizer, "update", copy_then_update):
        yield


def whole_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Reduced gradients of this stage by global name, put together over its ranks."""
    group = parallel_state.get_data_parallel_group()
    for chunk in trainer.chunks:
        for bucket_group in chunk.bucket_groups:
            for bucket in bucket_group.buckets:
                # the distributed optimizer leaves each rank its own shard of the sum
                if trainer.config.parallel.distributed_optimizer and group.size() > 1:
                    shards = bucket.grad_data.chunk(group.size())
                    mine = shards[group.rank()].clone()
                    dist.all_gather(list(shards), mine, group=group)
    found = {}
    for chunk in trainer.chunks:
        gpt = unwrapped(chunk)
        first = gpt.decoder.layers[0].layer_number - 1
        for name, parameter in gpt.named_parameters():
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                parts[at] = str(int(parts[at]) + first)
            found[".".join(parts)] = whole(parameter, parameter.main_grad).cpu()
    return found


def whole(parameter: Any, shard: torch.Tensor) -> torch.Tensor:
    """A tensor-parallel shard with the other ranks' shards; SwiGLU's two parts in whole order."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return shard.clone()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    dim, stride = parameter.partition_dim, parameter.partition_stride
    pieces = [piece.chunk(stride, dim=dim) for piece in shards]
    return torch.cat([pieces[r][s] for s in range(stride) for r in range(group.size())], dim=dim)


def train_run(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """A whole run through the trainer's front door; bytes that jobs before it left on the GPU."""
    left = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    return {"path": str(train(compose(overrides))), "left": left}


def validation(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """The validation loss of the initial weights."""
    trainer = started(overrides, device)
    return {"loss": evaluate(trainer, next(iter(trainer.data.valid))).loss}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "first_steps": first_steps,
    "each_recipe": each_recipe,
    "nudged_steps": nudged_steps,
    "train": train_run,
    "validation": validation,
}


def task_of(name: str) -> Callable[..., dict[str, Any]]:
    """A task above, or ``module.function`` of a file beside this one."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function) if module else TASKS[name]


def run(job: dict[str, Any]) -> dict[str, Any]:
    rank, size, device = job["rank"], job["size"], job["device"]
    local = job["local_rank"]
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(local))
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
        torch.cuda.reset_peak_memory_stats()
    store = dist.FileStore(job["store"], size)
    dist.init_process_group(
        "nccl" if "cuda" in device else "gloo", store=store, rank=rank, world_size=size
    )
    try:
        reply = task_of(job["task"])(
            job["overrides"], job["out"], steps=job.get("steps", 1), device=device
        )
    except UserError as error:
        reply = {"user_error": str(error)}
    leave(destroy=True)
    return reply


if __name__ == "__main__":
    gc.freeze()  # what was imported is there for good: each collection would look through it
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not look like a reply
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            reply = run(json.loads(line))
        except Exception:
            # the other ranks may wait for this one for ever, and NCCL's groups do not end before they do
            print(json.dumps({"error": traceback.format_exc()}), file=replies, flush=True)
            os._exit(1)
        gc.collect()  # groups end with their last reference, and gloo's threads of waiting ranks cost time
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        print(json.dumps(reply), file=replies, flush=True)
