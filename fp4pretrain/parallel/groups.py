"""Joining and leaving: device, process group, megatron-core's model-parallel groups, seeds.

Everything is read from torchrun's environment (``launch``); a process started by plain ``python`` is a
world of one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import weakref
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fp4pretrain.errors import UserError
from fp4pretrain.parallel.agreement import Meeting
from fp4pretrain.parallel.launch import check_address, launched

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MEETING = timedelta(minutes=10)  # for all ranks to come, before a config is known


class Holder(Protocol):
    """Who holds captured CUDA graphs with collectives of the groups in them."""

    def forget(self) -> None:
        """Let go of every graph."""


_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def let_go_before_leaving(holder: Holder) -> None:
    """Have ``leave`` call ``holder.forget`` first: as long as a captured graph with its collectives is left,
    NCCL does not end a communicator, and waits."""
    _holders.add(holder)


@dataclass(frozen=True)
class World:
    """Where this process stands. ``device`` is its device, ``data_*`` its place in data parallelism."""

    rank: int
    size: int
    device: torch.device
    data_rank: int
    data_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size() -> int:
    """The number of ranks torchrun started, 1 without torchrun. Raises UserError as ``launched``."""
    return launched().size


def pick_device(wanted: str) -> torch.device:
    """``auto`` | ``cpu`` | ``cuda`` as a device of this rank."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("parallel.device: cuda is asked for and torch sees none; use cpu or auto")
    local = launched().local_rank
    if local >= torch.cuda.device_count():
        raise UserError(
            f"--nproc-per-node: local rank {local} has no GPU (torch sees "
            f"{torch.cuda.device_count()}); start fewer ranks or set parallel.device=cpu"
        )
    return torch.device("cuda", local)


def join(
    *,
    device: torch.device,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    seed: int = 1234,
    timeout_minutes: float = 10.0,
    dropout: bool = False,
) -> World:
    """Form all groups. ``virtual_pipeline`` is the number of model chunks a pipeline rank holds.

    Groups of an earlier ``join`` with the same sizes stay: two models in one process share them. Groups
    of other sizes end.
    A rank that waits longer than ``timeout_minutes`` for another in a collective fails. Dead
    processes are noticed at once on gloo (their sockets close); hosts that vanish, and peers lost
    under NCCL, only by this.
    ``dropout``: whether random numbers are drawn on the device. Where none are, megatron-core's trackers of
    them are of the kind that a CUDA graph may be captured around.
    The layout must fit ``world_size()``: that is checked while composing.
    """
    gc.collect()  # what is left of an earlier run in this process holds its groups, and their threads
    if device.type == "cpu":
        from fp4pretrain.parallel.bridge import run_on_cpu

        run_on_cpu()
    else:
        torch.cuda.set_device(device)
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            # Nothing can be captured on the default stream, and what a captured backward pass
            # accumulates into must have been made on the stream that it is captured on.
            torch.cuda.set_stream(torch.cuda.Stream(device))

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        bind: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        timeout = timedelta(minutes=timeout_minutes)
        met = meet()
        met.store.set_timeout(timeout)
        store = dist.PrefixStore("groups", met.store)
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=met.rank, world_size=met.size, **bind
        )
    sizes = (tensor, pipeline, virtual_pipeline)
    if parallel_state.model_parallel_is_initialized() and _joined_sizes() != sizes:
        leave()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline,
            create_gloo_process_groups=True,
            distributed_timeout_minutes=timeout_minutes,
        )
    # The seed is the same on every rank: what is drawn from it (initial weights, rotation signs,
    # rounding noise) is keyed by names and global coordinates, not by rank. The host's generator too:
    # checkpoints hold it, and in a new process it stands anywhere.
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        use_cudagraphable_rng=device.type == "cuda" and not dropout,
        force_reset_rng=True,
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def _joined_sizes() -> tuple[int, int, int | None]:
    """Tensor, pipeline and virtual pipeline size of the groups that exist."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )


@cache
def meet() -> Meeting:
    """All ranks, before any group is formed: at the store through which they form theirs later.

    On one node that is torchrun's own store, which listens all the time. Torch 2.13 by itself would
    use this store too, but after a restart the new ranks would read the addresses that the ranks of
    the previous start left there: so every start has a prefix of its own. A port chosen for rank 0
    instead could be taken by another process before rank 0 opens it.
    """
    _die_with_launcher()
    environment = os.environ
    launch = launched()
    if not environment.get("RANK"):
        return Meeting(dist.HashStore(), 0, 1)
    check_address()
    rank, size = launch.rank, launch.size
    # With several nodes, each counts its own starts, so the count is no common prefix.
    one_node = environment.get("GROUP_WORLD_SIZE") == "1"
    if not one_node or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store, rank, size = next(dist.rendezvous("env://", timeout=_MEETING))
        return Meeting(store, rank, size)
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    tcp = dist.TCPStore(host, port, is_master=False, timeout=_MEETING)
    return Meeting(
        dist.PrefixStore(f"start_{environment['TORCHELASTIC_RESTART_COUNT']}", tcp), rank, size
    )


def _die_with_launcher() -> None:
    """Let the kernel kill this process with its torchrun (Linux). torchrun ends its processes itself,
    unless it is killed: they would train on, into the folder that a new start goes on in."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(*, destroy: bool = False) -> None:
    """Undo ``join`` so that this process can train another layout.

    ``destroy`` also ends the process group: for the end of the program.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    for holder in list(_holders):
        holder.forget()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    _destroy_subgroups()
    _forget_groups()
    if destroy and dist.is_initialized():
        dist.destroy_process_group()
        meet.cache_clear()  # its store holds what the groups that are gone wrote


def _forget_groups() -> None:
    """Let go of groups that megatron-core still holds: a group's threads end with its last reference, and
    until then gloo's look for work a hundred times a second. Two stay in ``parallel_state``; and the cache of
    rotary embeddings holds their modules, which hold a group."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    clear = getattr(RotaryEmbedding.forward, "cache_clear", None)
    if clear is not None:
        clear()


def _destroy_subgroups() -> None:
    """End every group but the default one: each holds threads and file descriptors, and megatron-core
    forgets its groups without ending them. (torch lists groups nowhere but in this map.)"""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
