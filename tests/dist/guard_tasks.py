"""Runs with a poison in them, for ``test_guards``: nothing in the product can do this.

An override ``poison=KIND:RANK:POSITIONS`` spoils the first microbatch that RANK reads of every step
that begins at one of these positions in the data (consumed samples, as ``8,16``, or ``40-`` for all
from there on):

    loss       the loss is NaN, and with it every gradient
    gradient   the gradient of one norm weight is Inf; the loss is finite
    spike      the loss is three times as high
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fp4pretrain.config import compose
from fp4pretrain.train import step as step_module
from fp4pretrain.train.main import train
from fp4pretrain.train.trainer import Trainer, unwrapped


def poisoned_run(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """A whole run; each rank leaves digests of its norm weights in ``out``."""
    poison = [o.removeprefix("poison=") for o in overrides if o.startswith("poison=")]
    config = compose([o for o in overrides if not o.startswith("poison=")])
    with _poisoned(poison) as trainers:
        try:
            path = train(config)
        finally:
            trainer = trainers[0]
            (Path(out) / f"rank_{trainer.world.rank}.json").write_text(json.dumps(_norms(trainer)))
    return {"path": str(path)}


@contextmanager
def _poisoned(poison: list[str]) -> Iterator[list[Trainer]]:
    trainers: list[Trainer] = []
    forward = step_module.ForwardStep.__call__
    hooked: set[int] = set()

    def call(self: Any, iterator: Any, chunk: Any) -> Any:
        trainer = self._trainer
        trainers[:] = [trainer]
        output, reduce = forward(self, iterator, chunk)
        for kind, bad in _rules(poison, trainer):
            if kind == "gradient" and id(chunk) not in hooked:
                hooked.add(id(chunk))
                norm = next(p for n, p in chunk.named_parameters() if "norm" in n)
                norm.register_hook(lambda g, bad=bad: g * float("inf") if bad() else g)
            elif torch.is_grad_enabled() and bad() and self._calls[id(chunk)] == 1:
                output = output * {"loss": float("nan"), "spike": 3.0}.get(kind, 1.0)
        return output, reduce

    step_module.ForwardStep.__call__ = call
    try:
        yield trainers
    finally:
        step_module.ForwardStep.__call__ = forward


def _rules(poison: list[str], trainer: Trainer) -> Iterator[tuple[str, Callable[[], bool]]]:
    for text in poison:
        kind, rank, positions = text.split(":")
        if trainer.world.rank == int(rank):
            yield kind, lambda p=positions: _within(trainer.consumed_samples, p)


def _within(position: int, positions: str) -> bool:
    if positions.endswith("-"):
        return position >= int(positions[:-1])
    return str(position) in positions.split(",")


def _norms(trainer: Trainer) -> dict[str, str]:
    """Digests of the norm weights, which tensor- and data-parallel ranks hold alike."""
    return {
        f"{index}.{name}": hashlib.sha256(p.detach().float().numpy().tobytes()).hexdigest()
        for index, chunk in enumerate(trainer.chunks)
        for name, p in unwrapped(chunk).named_parameters()
        if "norm" in name
    }
