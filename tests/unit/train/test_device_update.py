"""The update that stays on the device: megatron-core's weights, nothing written where a step is not finite.

PyTorch's fused Adam runs on CPUs too, so the path that GPUs take is walked here with a CPU's Adam fused.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp4pretrain.config import compose
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join, leave, pick_device
from fp4pretrain.train import replay
from fp4pretrain.train.asked import TIME
from fp4pretrain.train.guard import update
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer, build_trainer

SMALL = (
    "model.num_layers=2 model.hidden_size=32 model.num_attention_heads=2 model.ffn_hidden_size=64 "
    "model.seq_length=32 train.micro_batch=1 train.global_batch=2 train.steps=40 data.mock=true "
    "precision=bf16 optim.params_dtype=fp32 optim.clip=0.05 parallel.device=cpu"
).split()
OPTIMIZERS = {"distributed": [], "plain": ["parallel.distributed_optimizer=false"]}


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    yield
    leave()


def build(monkeypatch: pytest.MonkeyPatch, overrides: list[str], *, on_device: bool) -> Trainer:
    monkeypatch.setattr(
        update, "_fuses", lambda inner: on_device and isinstance(inner, torch.optim.Adam)
    )
    config = compose([*SMALL, *overrides])
    world = join(device=pick_device("cpu"), seed=config.seed)
    trainer = build_trainer(config, world, check_layout(config, 1))
    assert trainer.optimizer.on_device == on_device
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.chunks[0].parameters()]).clone()


def moments(trainer: Trainer) -> list[torch.Tensor]:
    inner: Any = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    return [t.clone() for one in inner for s in one.state.values() for t in s.values()]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_update_on_the_device_is_megatron_core_s(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    found = []
    for on_device in (False, True):
        trainer = build(monkeypatch, OPTIMIZERS[kind], on_device=on_device)
        start = weights(trainer)
        iterators = trainer.batches(0)
        rows = [train_step(trainer, iterators) for _ in range(4)]
        found.append((rows, weights(trainer) - start))
        leave()
    (host, moved), (device, also) = found
    for one, other in zip(host, device, strict=True):
        assert one["grad_norm"] > 0.05  # clipped
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["lr"] == one["lr"]
    # four updates of Adam, rounded otherwise: weights are 2^-24 apart, their changes are 1e-4
    assert float((also - moved).norm() / moved.norm()) < 1e-3


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_writes_nothing_and_the_next_one_does(
    monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    trainer = build(monkeypatch, [], on_device=True)
    iterators = trainer.batches(0)
    train_step(trainer, iterators)
    before, remembered = weights(trainer), moments(trainer)
    forward_backward = replay.forward_backward

    def spoiled(trainer: Trainer, iterators: Any) -> torch.Tensor | None:
        loss = forward_backward(trainer, iterators)
        assert loss is not None
        if bad == "loss":
            return loss * float("nan")
        next(trainer.chunks[0].parameters()).main_grad.view(-1)[3] = float("inf")
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(replay, "forward_backward", spoiled)
        row = train_step(trainer, iterators)
    assert not all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"]])))
    assert torch.equal(weights(trainer), before)
    for now, then in zip(moments(trainer), remembered, strict=True):
        assert torch.equal(now, then)  # Adam's count of steps too
    train_step(trainer, iterators)
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize("on_device", [False, True])
def test_what_backends_count_and_what_is_asked_travels_with_a_step_over_all_ranks(
    monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    trainer = build(monkeypatch, [], on_device=on_device)
    count = torch.tensor(2**33 + 5)  # beyond 32 bits
    monkeypatch.setattr(type(trainer.backend), "counters", lambda *_: {"lost": count})
    trainer.counted = {"lost": 0}  # the names are asked when a trainer is built
    trainer.asked.here = lambda: int(signal.SIGUSR1)
    iterators, all_reduce = trainer.batches(0), torch.distributed.all_reduce

    def three_ranks(numbers: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if numbers.dtype == torch.float64 and numbers.ndim == 1:
            numbers.mul_(
                3
            )  # this rank and two that have its numbers, and one was asked something else
            numbers[2] += 1
        return all_reduce(numbers, *args, **kwargs)

    monkeypatch.setattr(update.dist, "all_reduce", three_ranks)
    train_step(trainer, iterators)
    assert trainer.counted == {"lost": 3 * (2**33 + 5)}
    assert trainer.asked_for == signal.SIGUSR1  # above TIME, which another rank was asked
    trainer.asked.here = lambda: 0
    train_step(trainer, iterators)
    assert trainer.asked_for == TIME


def test_restored_state_is_as_the_fused_kernel_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(monkeypatch, OPTIMIZERS["plain"], on_device=True)
    train_step(trainer, trainer.batches(0))
    state = trainer.optimizer.state_dict()
    trainer.optimizer.load_state_dict(state)
    for part in trainer.optimizer.chained_optimizers:
        assert all(g["fused"] and g["capturable"] for g in part.optimizer.param_groups)
        steps = [s["step"] for s in part.optimizer.state.values()]
        assert steps and all(s.dtype == torch.float32 and float(s) == 1 for s in steps)
