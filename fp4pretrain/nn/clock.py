"""The moment a linear is called at: step and microbatch, the inputs of every noise key.

The microbatch is kept among megatron-core's RNG states, because that is what it is: activation
recompute restores those states before it runs a forward again, so a recomputed forward draws the
noise of the first one even when another microbatch is in flight by then (1F1B).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.tensor_parallel import get_cuda_rng_tracker

from fp4pretrain.ops import Draws, Moment

_STATE = "fp4pretrain-microbatch"


@dataclass
class Clock:
    """Shared by all linears of a model. ``weights_version`` changes whenever weights may have changed;
    ``draws`` is there while a step is rehearsed or captured for a CUDA graph."""

    seed: int
    step: int = 0
    weights_version: int = 0
    draws: Draws | None = None

    @property
    def moment(self) -> Moment:
        """What noise keys are made of, now."""
        return Moment(self.seed, self.step, self.microbatch, self.draws)

    @property
    def microbatch(self) -> int:
        """The microbatch being computed, counted over all data-parallel ranks."""
        return get_cuda_rng_tracker().states_.get(_STATE, 0)

    @microbatch.setter
    def microbatch(self, index: int) -> None:
        get_cuda_rng_tracker().states_[_STATE] = index

    def weights_changed(self) -> None:
        """Make cached casts of weights void. Call it after the optimizer's step and after loading a
        checkpoint."""
        self.weights_version += 1
