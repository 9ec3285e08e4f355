"""A whole small model with fused kernels and without, in Triton's interpreter: what differs, as JSON.

usage: [torchrun --nproc-per-node 2 -m] fused_model key=value ...

Both are built alike in FP32 on this many tensor-parallel ranks; loss and gradients of one step are compared.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from fp4pretrain.config import compose
from fp4pretrain.model import build
from fp4pretrain.model.layout import check_layout
from fp4pretrain.nn.fused import FusedMLP, FusedNorm, FusedSelfAttention
from fp4pretrain.parallel.groups import join, leave, world_size
from fp4pretrain.train.step import forward_backward
from fp4pretrain.train.trainer import build_trainer

SMALL = [
    "data.mock=true", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.kv_channels=8", "model.ffn_hidden_size=48", "model.seq_length=16", "model.vocab_size=300",
    "train.micro_batch=2", "train.global_batch=2", "data.valid_tokens=64", "precision=bf16",
    "optim.params_dtype=fp32", "parallel.device=cpu", "parallel.distributed_optimizer=false",
]  # fmt: skip


def gradients(overrides: list[str], *, fused: bool) -> dict[str, Any]:
    """Loss, gradients by name, and which fused modules there are."""
    build.fuses = lambda config: fused
    config = compose([*SMALL, f"parallel.tensor={world_size()}", *overrides])
    world = join(device=torch.device("cpu"), tensor=world_size(), seed=config.seed)
    trainer = build_trainer(config, world, check_layout(config, world_size()))
    loss = forward_backward(trainer, trainer.batches(0))
    assert loss is not None
    named = trainer.chunks[0].named_parameters()
    found = {"loss": loss.clone(), **{n: p.main_grad.clone() for n, p in named}}
    kinds = (FusedNorm, FusedMLP, FusedSelfAttention)
    modules = [type(m).__name__ for m in trainer.chunks[0].modules() if isinstance(m, kinds)]
    return {"found": found, "modules": sorted(set(modules))}


def main() -> None:
    plain = gradients(sys.argv[1:], fused=False)
    mine = gradients(sys.argv[1:], fused=True)
    errors = {
        name: float((mine["found"][name] - want).norm() / want.norm().clamp(min=1e-12))
        for name, want in plain["found"].items()
    }
    if dist.get_rank() == 0:
        worst = max(errors, key=lambda name: errors[name])
        told = {"worst": [worst, errors[worst]], "modules": mine["modules"], "loss": errors["loss"]}
        print(json.dumps(told), flush=True)
    leave()


if __name__ == "__main__":
    main()
