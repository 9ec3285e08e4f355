"""How far weights and their casts go while a window of ``precision.deoscillation`` is open.

Each step adds |w' - w| and |Q(w') - Q(w)| of every element, both casts made by the later step's recipe.
So what has to be kept for a restart is the two sums alone: the weight is the run's own, and its cast
follows from it. A step whose recipe leaves a linear's weight uncast adds nothing there.

An open window holds four tensors of a block weight's size: two FP32 sums, the weight and its cast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4pretrain.nn.linear import Bound
from fp4pretrain.ops import Cast
from fp4pretrain.precision.deoscillation import unsettled
from fp4pretrain.train.optimizer import set_elements


@dataclass
class WeightPath:
    """Of one linear: its weight [n, k] after the last step, its ``cast`` and the cast ``by`` which it was
    made (None: not cast so far), and the distances [n, k] that weight and cast have moved since the window
    opened (FP32)."""

    linear: Bound
    weight: Tensor
    moved: Tensor
    cast_moved: Tensor
    by: Cast | None = None
    cast: Tensor | None = None

    def step(self) -> None:
        """Add how far one step moved both. Collective as ``Bound.cast_weight``."""
        now, by = self.linear.weight.detach(), self.linear.weight_cast()
        if unsettled(by.spec, rotated=by.rotation_size > 0) is None:
            before = self.cast if by == self.by else self.linear.cast_weight(self.weight)
            after = self.linear.cast_weight(now)
            assert before is not None
            self.moved += (now.float() - self.weight.float()).abs_()
            self.cast_moved += (after.float() - before.float()).abs_()
            self.by, self.cast = by, after
        else:
            self.by = self.cast = None
        self.weight.copy_(now)


class WeightPaths:
    """The open window's paths of this rank's block weights; none while no window is open."""

    def __init__(self, linears: Iterable[tuple[int | None, str, Bound]]) -> None:
        self._linears = [linear for layer, _, linear in linears if layer is not None]
        self.open: list[WeightPath] = []

    def begin(self) -> None:
        """Open a window at the weights as they are."""
        self.open = [
            WeightPath(
                linear,
                linear.weight.detach().clone(),
                torch.zeros_like(linear.weight, dtype=torch.float32),
                torch.zeros_like(linear.weight, dtype=torch.float32),
            )
            for linear in self._linears
        ]

    def step(self) -> None:
        """Add how far one step moved them to every path."""
        for path in self.open:
            path.step()

    @torch.no_grad()
    def reset(self, optimizer: Any, *, ratio: float) -> tuple[int, int]:
        """Set each weight whose cast went at least ``ratio`` times as far as it did onto that cast, in
        the optimizer's master too; close the window. Returns the number of weights set on this rank, and
        the number of weights followed."""
        resets, elements = [], 0
        for path in self.open:
            elements += path.moved.numel()
            if path.cast is None:
                continue
            swings = (path.cast_moved >= ratio * path.moved) & (path.moved > 0)
            set_elements(optimizer, path.linear.weight, swings, path.cast)
            resets.append(swings.sum())
        self.open = []
        return int(torch.stack(resets).sum()) if resets else 0, elements

    def sums(self) -> Sequence[tuple[Tensor, dict[str, Tensor]]]:
        """Each open path's parameter, and what a checkpoint keeps of the path."""
        return [
            (path.linear.weight, {"weight": path.moved, "cast": path.cast_moved})
            for path in self.open
        ]
