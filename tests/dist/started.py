"""A trainer on the groups of a test's ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fp4pretrain.config import compose
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join, leave
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer, build_trainer, join_run


def started(overrides: list[str], device: str) -> Trainer:
    """Built from a run's overrides; every rank calls it."""
    config = compose(overrides)
    layout = check_layout(config, dist.get_world_size())
    p = config.parallel
    world = join(
        device=torch.device(device),
        tensor=p.tensor,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        seed=config.seed,
    )
    return build_trainer(config, world, layout)


def losses_alone(overrides: list[str], *, steps: int) -> list[float]:
    """Losses of a run's first steps in this process alone, which leaves its groups again."""
    config = compose(overrides)
    try:
        trainer = build_trainer(config, join_run(config), check_layout(config, 1))
        iterators, losses = trainer.batches(0), []
        for _ in range(steps):
            trainer.binding.apply(trainer.progress)
            losses.append(train_step(trainer, iterators)["loss"])
        return losses
    finally:
        leave()
