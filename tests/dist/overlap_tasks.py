"""A run whose data-parallel communication overlaps on CPUs too, for ``worker``: ``overlap_tasks.NAME``."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from fp4pretrain.config import compose
from fp4pretrain.train import trainer
from fp4pretrain.train.main import train


def overlapped(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """A whole run. ``ahead``: weights that a forward pass gathered, ``between``: that somebody waited for."""
    counts = {"ahead": 0, "between": 0}
    start = _ParamAndGradBucketGroup.start_param_sync

    def counted(self: Any, force_sync: bool = False) -> None:
        counts["between" if force_sync else "ahead"] += 1
        start(self, force_sync=force_sync)

    with (
        patch.object(trainer, "overlaps", lambda config, world: world.data_size > 1),
        patch.object(_ParamAndGradBucketGroup, "start_param_sync", counted),
    ):
        train(compose(overrides))
    return counts
