"""Whole small models with fused kernels and without, in Triton's interpreter: what differs, as JSON.

usage: [torchrun --nproc-per-node 2] fused_model.py '{"a case": ["key=value", ...], ...}'

Both are built alike in FP32 on this many tensor-parallel ranks; loss and gradients of one step are compared.
Linears multiply in FP32: an element that a last bit moves over a boundary of BF16 moves gradients by 4e-4.
With a quantized recipe the fused model alone is run, and every amax that a kernel handed to a cast is held
against the one that the reference backend measures, bit for bit. Cases that begin with "adam" take steps by
our Adam and by PyTorch's. Those that begin with "staged" tell the bits of a fused model, for pipeline stages
to be held against.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import fp4_kernels.norm as norms
import torch
import torch.distributed as dist
from fp4_kernels.norm import norm_backward
from patch_once import patch_once

from fp4pretrain.config import compose
from fp4pretrain.model import build
from fp4pretrain.model.layout import check_layout
from fp4pretrain.nn.embedding import FusedPositionEmbedding, FusedVocabEmbedding
from fp4pretrain.nn.fused import FusedMLP, FusedNorm, FusedSelfAttention
from fp4pretrain.ops import handed, reference
from fp4pretrain.ops.triton_backend import TritonBackend
from fp4pretrain.parallel.groups import join, leave, world_size
from fp4pretrain.train import checkpoint, optimizer, replay
from fp4pretrain.train import trainer as training
from fp4pretrain.train.adam import adam_of
from fp4pretrain.train.guard import update
from fp4pretrain.train.step import forward_backward, train_step
from fp4pretrain.train.trainer import build_trainer, join_run, unwrapped

SMALL = [
    "data.mock=true", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    "model.kv_channels=8", "model.ffn_hidden_size=48", "model.seq_length=16", "model.vocab_size=300",
    "train.micro_batch=2", "train.global_batch=2", "data.valid_tokens=64", "precision=bf16",
    "optim.params_dtype=fp32", "parallel.device=cpu", "parallel.distributed_optimizer=false",
]  # fmt: skip


class Exact(reference.ReferenceBackend):
    """The reference, whose BF16 is FP32."""

    def quantize(self, x: Any, casts: Any, *_: Any, **__: Any) -> Any:
        return [reference.EmulatedOperand(reference.oriented(x, c).float(), None) for c in casts]


class Asking(reference.ReferenceBackend):
    """The reference, which awaits what the Triton backend does and holds it against what it measures."""

    def __init__(self) -> None:
        self.handed: Counter[str] = Counter()
        self.wrong: list[str] = []

    def awaits(self, casts: Any, device: Any) -> Any:
        return TritonBackend().awaits(casts, device)

    def quantize(self, x: Any, casts: Any, *how: Any, **named: Any) -> Any:
        for i, amax in handed.take(x, casts).items():
            oriented = reference.oriented(x, casts[i])
            want = reference.spanning_amax(oriented, casts[i].spec)
            name = f"{casts[i].site.linear} {casts[i].site.gemm} {casts[i].site.operand}"
            self.handed[name] += 1
            if float(amax) != float(want):
                self.wrong.append(f"{name}: {float(amax)}, not {float(want)}")
        return super().quantize(x, casts, *how, **named)


def handed_over(overrides: list[str]) -> dict[str, Any]:
    """What a step of the fused model handed to casts, by "linear GEMM operand", and what of it was wrong."""
    backend = Asking()
    gradients(overrides, backend, fused=True)
    return {"handed": backend.handed, "wrong": backend.wrong}


def stepped(overrides: list[str], backend: Any, *, fused: bool) -> tuple[Any, torch.Tensor | None]:
    """(trainer, this rank's loss) of a model whose gradients are those of its first step."""
    build.fuses = lambda config: fused
    training.choose = lambda *_, **__: (backend, "the test's")
    config = compose([*SMALL, *overrides])
    trainer = build_trainer(config, join_run(config), check_layout(config, world_size()))
    drawn = torch.Generator().manual_seed(7)
    for name, parameter in trainer.chunks[0].named_parameters():
        if name.endswith("bias"):  # zeros would be added nowhere unseen
            parameter.data.normal_(std=0.02, generator=drawn)
    return trainer, forward_backward(trainer, trainer.batches(0))


def gradients(overrides: list[str], backend: Any, *, fused: bool) -> dict[str, Any]:
    """Loss, gradients by name, and which fused modules there are."""
    tensor = f"parallel.tensor={world_size()}"
    trainer, loss = stepped([tensor, *overrides], backend, fused=fused)
    assert loss is not None
    named = trainer.chunks[0].named_parameters()
    found = {"loss": loss.clone(), **{n: p.main_grad.clone() for n, p in named}}
    kinds: tuple[type, ...] = (FusedNorm, FusedMLP, FusedSelfAttention)
    kinds += (FusedVocabEmbedding, FusedPositionEmbedding)
    modules = [type(m).__name__ for m in trainer.chunks[0].modules() if isinstance(m, kinds)]
    return {"found": found, "modules": sorted(set(modules))}


def globally_named(gpt: Any) -> Iterator[tuple[str, Any]]:
    """A chunk's parameters by name, with the whole model's numbers of layers."""
    first = gpt.decoder.layers[0].layer_number - 1
    for name, parameter in gpt.named_parameters():
        yield re.sub(r"(?<=layers\.)\d+", lambda found: str(int(found[0]) + first), name), parameter


def staged(overrides: list[str]) -> dict[str, Any]:
    """Of the fused model on all ranks: the loss, a digest of each gradient, and how many backward passes of
    norms added a gradient from elsewhere. An addition by autograd would have the same bits here, where the
    interpreter rounds the product first, and others on a GPU, where a multiply-add does not."""
    added = 0

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal added
        added += arguments[-1].residual is not None
        return norm_backward(*arguments)

    with patch.object(norms, "norm_backward", counting):
        trainer, loss = stepped(overrides, Exact(), fused=True)
    mine: dict[str, Any] = {} if loss is None else {"loss": float(loss)}
    for chunk in trainer.chunks:
        for name, parameter in globally_named(unwrapped(chunk)):
            mine[name] = hashlib.sha256(parameter.main_grad.numpy().tobytes()).hexdigest()
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, (mine, added))
    bits = {name: bit for ours, _ in told for name, bit in ours.items()}
    return {"bits": bits, "added": sum(count for _, count in told)}


def compared(overrides: list[str]) -> dict[str, Any]:
    """How far the fused model's loss and gradients are from the plain one's, relative to these."""
    plain = gradients(overrides, Exact(), fused=False)
    mine = gradients(overrides, Exact(), fused=True)
    errors = {
        name: float((mine["found"][name] - want).norm() / want.norm().clamp(min=1e-12))
        for name, want in plain["found"].items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return {"worst": [worst, errors[worst]], "modules": mine["modules"], "loss": errors["loss"]}


def adam_steps(overrides: list[str], folder: Path) -> dict[str, Any]:
    """How far four steps by our Adam end from four by PyTorch's, of which the third is held back; and whether
    the last two, from a checkpoint of the first two, end where they did."""
    update._fuses = lambda _: True  # as on a GPU
    training.choose = lambda *_, **__: (Exact(), "the test's")
    config = compose([*SMALL, "optim.clip=0.05", "train.steps=9", *overrides])
    world = join(device=torch.device("cpu"), seed=config.seed)
    build.fuses = lambda config: False

    def spoiled(*arguments: Any) -> torch.Tensor | None:
        loss = forward_backward(*arguments)
        return None if loss is None else loss * torch.nan

    def trained(ours: bool, saved: Path | None = None) -> tuple[Any, torch.Tensor, list[Path]]:
        optimizer.fuses = lambda config: ours
        trainer = build_trainer(config, world, check_layout(config, 1))
        paths = []
        if saved is not None:
            checkpoint.load(trainer, saved)
        for step in range(trainer.step + 1, 5):
            replay.forward_backward = spoiled if step == 3 else forward_backward
            train_step(trainer, trainer.batches(trainer.consumed_samples))
            if step == 2:
                paths.append(checkpoint.save(trainer, folder / str(ours), keep_last=1))
        weights = torch.cat([p.detach().double().flatten() for p in trainer.chunks[0].parameters()])
        return trainer, weights, paths

    plain, want, _ = trained(False)
    ours, got, paths = trained(True)
    again = trained(True, paths[0])[1]
    return {
        "adam": [adam_of(trainer.optimizer) for trainer in (plain, ours)],
        "error": float((got - want).norm() / want.norm()),
        "again": torch.equal(got, again),
    }


def main() -> None:
    patch_once()
    told = {}
    for case, overrides in json.loads(sys.argv[1]).items():
        if case.startswith("adam"):
            with TemporaryDirectory() as folder:
                told[case] = adam_steps(overrides, Path(folder))
            continue
        if case.startswith("staged"):
            told[case] = staged(overrides)
            continue
        quantized = any(word.startswith("precision=") for word in overrides)
        told[case] = handed_over(overrides) if quantized else compared(overrides)
    if dist.get_rank() == 0:
        print(json.dumps(told), flush=True)
    leave()


if __name__ == "__main__":
    main()
