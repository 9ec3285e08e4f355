"""A job of a rank for ``worker``: which noise keys its casts drew, and for which elements."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from checkpoint_tasks import steps_of
from started import started
from torch import Tensor

from fp4pretrain.numerics import Noise
from fp4pretrain.ops import watching


def keys(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """What any rank drew in ``steps`` steps, in order: layer, linear, GEMM, operand, key, the rows and
    columns of the whole operand that the key was drawn for, and whether for every element of them."""
    drawn: dict[tuple, list[tuple[Tensor, Tensor]]] = {}

    def note(seen: watching.Seen) -> None:
        for cast in seen.casts:
            if cast.noise is not None and cast.site is not None:
                shape = seen.x.shape[::-1] if cast.transpose else seen.x.shape
                drawn.setdefault((*cast.site.path, cast.noise.key), []).append(
                    places(cast.noise, *shape)
                )

    trainer = started(overrides, device)
    watching.attach(note)
    try:
        steps_of(trainer, steps)
    finally:
        watching.detach()
    everyones: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyones, drawn)
    names = sorted(set().union(*everyones))
    found = [
        (*name, *covered([place for one in everyones for place in one.get(name, ())]))
        for name in names
    ]
    return {"drawn": found, "mine": len(drawn)}


def places(noise: Noise, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Global rows and columns of a shard, by what ``numerics.Noise`` says of its fields."""

    def apart(length: int, offset: int, part: int, gap: int) -> Tensor:
        local = torch.arange(length)
        return offset + local + (local // part * gap if part else 0)

    return (
        apart(rows, noise.row_offset, noise.row_part, noise.row_gap),
        apart(cols, noise.col_offset, noise.col_part, noise.col_gap),
    )


def covered(shards: list[tuple[Tensor, Tensor]]) -> tuple[int, int, bool]:
    """Rows and columns up to the last that any shard has, and whether every element is in a shard."""
    rows, cols = (1 + max(int(shard[axis].max()) for shard in shards) for axis in (0, 1))
    whole = torch.zeros(rows, cols, dtype=torch.bool)
    for row_r, col_c in shards:
        whole[row_r[:, None], col_c] = True
    return rows, cols, bool(whole.all())
