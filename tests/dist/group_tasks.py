"""A job of a rank for ``worker``: models one after the other in one process."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from started import started


def twice(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Build a model, one more like it, and one on pipeline stages; (TP, PP, groups there are) after each."""
    found = []
    other = ["parallel.tensor=1", "parallel.pipeline=2"]
    for layout in ([], [], other):
        started([*overrides, *layout], device)
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        found.append([*sizes, len(dist.distributed_c10d._world.pg_map)])
    return {"found": found}
