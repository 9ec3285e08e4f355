"""A job of a rank for ``worker``: which noise keys its casts drew."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from checkpoint_tasks import steps_of
from started import started

from fp4pretrain.ops import watching


def keys(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """All (layer, linear, GEMM, operand, key) that any rank drew in ``steps`` steps, in order."""
    drawn: set[tuple] = set()

    def note(seen: watching.Seen) -> None:
        for cast in seen.casts:
            if cast.noise is not None and cast.site is not None:
                drawn.add((*cast.site.path, cast.noise.key))

    trainer = started(overrides, device)
    watching.attach(note)
    try:
        steps_of(trainer, steps)
    finally:
        watching.detach()
    everyones: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyones, drawn)
    return {"drawn": sorted(set().union(*everyones)), "mine": len(drawn)}
