"""Amaxes that a kernel took of a tensor while it wrote it, handed to the casts that read the tensor next.

A cast under one scale a tensor reads its tensor twice: for the largest magnitude, then to quantize. Where
a kernel of ours writes the tensor it can take the magnitude on the way (`fp4_kernels.spec.Leave`), which
saves the first read. A maximum is exact, so no bit depends on who took it.

What was handed counts for exactly the memory that was written, while that is alive and nothing has been
written to it through PyTorch since (views share a version), and for the casts it was taken for. Anything else
is measured by a pass of its own. All-reductions over tensor-parallel ranks come after, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fp4_kernels.spec import Leave, Turn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.keys import Site

_MOST = 64  # entries before those of dead tensors are dropped
_ZEROS = 512  # pairs that one small launch sets to 0


@dataclass(frozen=True)
class Awaited:
    """What casts of one tensor [t, n] will ask: ``plain`` its amax, ``turn`` that of its rotated transpose.

    ``turns``: by the site of each cast, the rotation whose amax it scales by (size 0: the plain one).
    """

    turns: tuple[tuple[Site, Turn], ...]

    @property
    def plain(self) -> bool:
        """Whether a cast does not rotate."""
        return any(not turn.size for _, turn in self.turns)

    @property
    def turn(self) -> Turn | None:
        """The rotation of the casts that do."""
        return next((turn for _, turn in self.turns if turn.size), None)

    def leave(self, device: torch.device) -> Leave:
        """What the writing kernel is given, with memory for the amaxes that is 0 and nobody else's."""
        return Leave(self.plain, self.turn, _zeros(device))


_POOLS: dict[torch.device, list[Tensor]] = {}


def _zeros(device: torch.device) -> Tensor:
    """int32 [2] of zeros, handed out once."""
    pool = _POOLS.get(device)
    if not pool:
        with torch.inference_mode(False):  # an evaluation may come first, a training step second
            # each at a multiple of 16 bytes: Triton compiles anew for other addresses
            fresh = torch.zeros(_ZEROS, 4, dtype=torch.int32, device=device)
            pool = _POOLS[device] = list(fresh[:, :2].unbind())
    return pool.pop()


def fresh_zeros() -> None:
    """Hand out none of the memory that was set to 0 until now: before a step is captured, whose replays have
    to set theirs to 0 themselves, and after it, since what is left is the graph's."""
    _POOLS.clear()


@dataclass(frozen=True)
class _Given:
    storage: StorageWeakRef
    version: int
    shape: tuple[int, int]
    awaited: Awaited
    amaxes: Tensor


_GIVEN: dict[int, _Given] = {}


def give(x: Tensor, awaited: Awaited, leave: Leave) -> None:
    """Hand on what a kernel left of the contiguous x [..., n] that it has just written."""
    if len(_GIVEN) >= _MOST:
        for address in [a for a, given in _GIVEN.items() if given.storage.expired()]:
            del _GIVEN[address]
    shape = (x.numel() // x.shape[-1], x.shape[-1])
    storage = StorageWeakRef(x.untyped_storage())
    _GIVEN[x.data_ptr()] = _Given(storage, x._version, shape, awaited, leave.amaxes)


def take(x: Tensor, casts: Sequence[Cast]) -> dict[int, Tensor]:
    """{place of a cast: its amax, an fp32 scalar} of x [rows, cols], for the amaxes that were handed. A
    second call finds none."""
    given = _GIVEN.pop(x.data_ptr(), None)
    if given is None or x.is_inference():
        return {}
    same_memory = not given.storage.expired() and given.storage.cdata == x.untyped_storage()._cdata
    unchanged = x._version == given.version and x.is_contiguous()
    if not (same_memory and unchanged and (x.shape[0], x.shape[1]) == given.shape):
        return {}
    turns = dict(given.awaited.turns)
    found = {}
    for i, cast in enumerate(casts):
        turn = turns.get(cast.site) if cast.site is not None else None
        if turn == Turn(cast.rotation_size, cast.signs, cast.rotated_fp32):
            found[i] = given.amaxes[1 if turn.size else 0]
    return found
