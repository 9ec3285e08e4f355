"""Loss and weight gradient of held-out batches under any recipes, against those in BF16.

A batch is a few microbatches of the first validation set; every variant reads the same ones with the
same weights and the same rounding noise, so differences are the casts' alone. Nothing is updated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from fp4pretrain.data import EvaluationSampler
from fp4pretrain.errors import UserError
from fp4pretrain.precision import BF16, Recipe
from fp4pretrain.train.step import ForwardStep, evaluation_sampler, masked_mean, run_schedule
from fp4pretrain.train.trainer import Trainer

_NOISE = 1 << 25  # microbatch numbers for noise that neither training nor evaluation uses


@dataclass(frozen=True)
class Effect:
    """Of one batch: relative change of the loss, and ``|g - g0| / |g0|`` of the linears' weight
    gradients g, both against BF16. A gradient that is not finite has the error Inf."""

    loss: float
    gradient: float


class Lab:
    """A trainer, held still, with ``batches`` held-out batches."""

    def __init__(self, trainer: Trainer, *, batches: int) -> None:
        self._trainer = trainer
        self._name = next(iter(trainer.data.valid))
        sequences = len(trainer.data.valid[self._name])
        self._microbatches = trainer.config.parallel.pipeline  # each stage is busy
        self._each = self._microbatches * trainer.world.data_size
        largest = evaluation_sampler(trainer, sequences=sequences).micro_batch
        self._size = min(largest, sequences // (batches * self._each))
        if not self._size:
            raise UserError(
                f"batches: the validation set has {sequences} sequences, too few for {batches} batches "
                f"of {self._each} or more; lower --batches, or raise data.valid_tokens"
            )
        self.batches = batches
        trainer.binding.sites.recording = False
        for chunk in trainer.chunks:
            chunk.eval()  # no dropout; gradients are made all the same

    def effects(self, variants: Sequence[Sequence[Recipe]]) -> list[list[Effect]]:
        """For each variant (a recipe for each linear of ``trainer.binding``) its effect on each batch."""
        found: list[list[Effect]] = [[] for _ in variants]
        for batch in range(self.batches):
            plain = [BF16] * len(self._trainer.binding.linears)
            loss = self._run(plain, batch)
            truth = [gradient.clone() for gradient in self._gradients()]
            norm = self._squares(truth)
            for variant, effects in zip(variants, found, strict=True):
                changed = self._run(variant, batch) / loss - 1
                pairs = zip(self._gradients(), truth, strict=True)
                error = math.sqrt(self._squares([g - g0 for g, g0 in pairs]) / norm)
                effects.append(Effect(changed, error if math.isfinite(error) else math.inf))
        return found

    def _run(self, recipes: Sequence[Recipe], batch: int) -> float:
        """Forward and backward of one batch; its mean loss, known to every rank."""
        trainer = self._trainer
        trainer.binding.set_recipes(recipes)
        for chunk in trainer.chunks:
            chunk.zero_grad_buffer()
        trainer.clock.step = trainer.step
        world, first = trainer.world, batch * self._each
        sampler = EvaluationSampler(micro_batch=self._size, microbatches=self._microbatches)
        sampler.numbers = range(first + world.data_rank, first + self._each, world.data_size)
        losses = run_schedule(
            trainer,
            trainer.evaluation_batches(self._name, sampler),
            ForwardStep(trainer, loss=masked_mean, first_microbatch=_NOISE + first),
            micro_batch=self._size,
            microbatches=self._microbatches,
            forward_only=False,
        )
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for entry in losses:
            total += torch.stack([entry["loss"].double(), torch.ones_like(total[0])])
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return float(total[0] / total[1])

    def _gradients(self) -> list[Tensor]:
        linears = self._trainer.binding.linears
        # a tied head has the embedding's; parts of a linear have one weight
        weights = {id(one.weight): one.weight for layer, _, one in linears if layer is not None}
        return [weight.main_grad for weight in weights.values()]

    def _squares(self, tensors: Sequence[Tensor]) -> float:
        """Sum of the squares over the model's shards."""
        total = torch.zeros((), dtype=torch.float64, device=self._trainer.world.device)
        for tensor in tensors:
            total += tensor.double().square().sum()
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return float(total)
