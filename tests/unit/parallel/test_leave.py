"""A run that ended leaves no groups behind: a sweep is many runs in one process."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core import tensor_parallel

from fp4pretrain.config import compose
from fp4pretrain.parallel.groups import join, leave
from fp4pretrain.train.main import train

RUN = (
    "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2 model.ffn_hidden_size=64 "
    "model.seq_length=32 data.mock=true precision=bf16 train.steps=1 train.micro_batch=1 "
    "train.global_batch=2 train.eval_interval=0 data.valid_tokens=64 logging=quiet optim.warmup=0 "
    "optim.decay=0 logging.wandb.mode=disabled checkpoint.at_end=false"
).split()


def test_runs_of_one_process_do_not_pile_up_threads_and_descriptors(tmp_path: Path) -> None:
    """megatron-core forgets its groups without ending them: 51 threads and 68 descriptors a run."""
    counts, process = [], psutil.Process()
    for number in range(3):
        train(compose([*RUN, f"run_dir={tmp_path}/{number}"]))
        gc.collect()
        counts.append([process.num_threads(), process.num_fds()])
    threads, descriptors = (after - before for before, after in zip(*counts[1:], strict=True))
    assert threads <= 0 and descriptors <= 0


def test_the_host_s_generator_is_seeded_where_megatron_core_seeds_the_gpu_s_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint holds it, and in a new process it stands anywhere. On a CPU our bridge has megatron-core's
    seeding reach it, which a GPU's does not: that is taken away here."""
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None)
    states = []
    try:
        for seed in (7, 7, 8):
            torch.seed()
            join(device=torch.device("cpu"), seed=seed)
            states.append(torch.get_rng_state())
    finally:
        leave(destroy=True)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
