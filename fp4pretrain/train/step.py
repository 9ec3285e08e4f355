"""One optimizer step and one evaluation, on megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from fp4pretrain.data import EvaluationSampler
from fp4pretrain.nn.attention import document_mask
from fp4pretrain.precision import BF16
from fp4pretrain.train.gathering import forget_gathered
from fp4pretrain.train.guard.update import Outcome, StepHealth

if TYPE_CHECKING:
    from fp4pretrain.train.trainer import Batch, Trainer

# Evaluation draws its noise from microbatch numbers that training never reaches.
_EVALUATION = 1 << 24
# Tokens of an evaluation's microbatch: about one sequence of the long-context presets.
_EVALUATION_TOKENS = 8192
# Parts of a validation set whose losses are kept, for the spread of a gap over them.
_PARTS = 32


def masked_mean(
    loss_mask_bs: torch.Tensor, loss_bs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss (nats a token) of one microbatch [b, s] over the tokens that count."""
    loss = (loss_bs.float() * loss_mask_bs).sum() / loss_mask_bs.sum().clamp(min=1)
    # a copy: megatron-core divides the loss by the number of microbatches in place
    return loss, {"loss": loss.detach().clone()}


def known_gradients(loss_mask_bs: torch.Tensor, microbatches: int) -> torch.Tensor:
    """The gradient [b, s] that each token's loss gets from ``masked_mean`` of one of so many microbatches."""
    return loss_mask_bs.float() / (loss_mask_bs.sum().clamp(min=1) * microbatches)


def masked_sum(
    loss_mask_bs: torch.Tensor, loss_bs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sums of the losses (nats) of one microbatch's sequences [b] over the tokens that count, and how
    many those are, in float64."""
    loss_b = (loss_bs.double() * loss_mask_bs).sum(dim=1)
    return loss_b.sum().float(), {"loss": loss_b, "tokens": loss_mask_bs.double().sum(dim=1)}


class ForwardStep:
    """megatron-core's ``forward_step_func``: next microbatch through one model chunk.

    Each chunk sees its microbatches in order on every schedule, so counting its calls gives the
    microbatch; over data-parallel ranks microbatch m of rank r is m * ranks + r, the order in which
    one rank alone would read them. ``loss``: (loss_mask, losses [b, s]) -> what is minimized, record.
    ``known``: loss_mask -> the gradient [b, s] that the losses are going to get, if that is known.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        loss: Callable[..., Any],
        first_microbatch: int = 0,
        known: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._trainer = trainer
        self._loss = loss
        self._known = known
        self._first = first_microbatch
        self._calls: dict[int, int] = {}

    def __call__(
        self, iterator: Iterator[Batch] | None, chunk: Any
    ) -> tuple[torch.Tensor, Callable]:
        world = self._trainer.world
        call = self._calls.get(id(chunk), 0)
        self._calls[id(chunk)] = call + 1
        self._trainer.clock.microbatch = self._first + call * world.data_size + world.data_rank
        batch: dict[str, Any] = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"))
        mask = None
        if iterator is not None:
            read = dict(next(iterator))
            documents_bs = read.pop("documents", None)
            # asked on the host: where each sequence is of one document, the mask is causal alone
            if documents_bs is not None and bool(documents_bs[:, -1].any()):
                mask = document_mask(
                    documents_bs.to(world.device, non_blocking=True),
                    dtype=self._trainer.transformer.params_dtype,
                )
            batch = {k: v.to(world.device, non_blocking=True) for k, v in read.items()}
        loss_mask = batch["loss_mask"]
        known = {}
        if self._known is not None and loss_mask is not None:
            known = {"known_bs": self._known(loss_mask)}
        output = chunk(
            batch["tokens"],
            batch["position_ids"],
            attention_mask=mask,
            labels=batch["labels"],
            **known,
        )
        return output, partial(self._loss, loss_mask)


@dataclass(frozen=True)
class Begun:
    """A step that the device has been given. ``lr``: the learning rate of its update."""

    outcome: Outcome
    lr: float


def train_step(
    trainer: Trainer, iterators: list[Iterator[Batch] | None], *, go_on: bool = False
) -> dict[str, float]:
    """Forward, backward, clip and update once; returns loss, grad_norm and lr of this step.

    Where loss or grad_norm is not finite the update was left out. ``go_on``: the caller will do nothing but
    read the returned numbers before it asks for the next step, from the same ``iterators``. Where steps are
    replayed the device then gets the next one before the host waits for this one's numbers, so that it
    never stands still; that step is ``trainer.begun``.
    """
    begun, trainer.begun = trainer.begun, None
    if begun is None:
        begun = _begin(trainer, iterators)
    trainer.step += 1
    trainer.consumed_samples += trainer.config.train.global_batch
    if go_on and trainer.replays.ready(trainer):
        trainer.begun = _begin(trainer, iterators)
    numbers = begun.outcome.read()
    kinds = len(trainer.asked.flags)
    trainer.asked_for = trainer.asked.most(numbers.carried[:kinds])
    trainer.counted = dict(zip(trainer.counted, map(int, numbers.carried[kinds:]), strict=True))
    return {"loss": numbers.loss, "grad_norm": numbers.grad_norm, "lr": begun.lr}


def _begin(trainer: Trainer, iterators: list[Iterator[Batch] | None]) -> Begun:
    """Give the device the step after ``trainer.step``, and all that has to happen between two steps."""
    trainer.clock.step = trainer.step
    forget_gathered(trainer.chunks)  # a captured step has to gather, whatever was done before it
    outcome = trainer.replays.step(trainer, iterators)
    forget_gathered(trainer.chunks)  # a replayed one says nothing of itself
    lr = trainer.optimizer.learning_rate
    trainer.schedule.step(increment=1)
    trainer.clock.weights_changed()
    trainer.binding.sites.finish_step(trainer.step + 1)
    return Begun(outcome, lr)


def forward_backward(
    trainer: Trainer, iterators: Sequence[Iterator[Batch] | None]
) -> torch.Tensor | None:
    """Gradients of one step in the buffers of DDP; this rank's mean loss, None without any."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    microbatches = trainer.layout.microbatches
    losses = run_schedule(
        trainer,
        iterators,
        ForwardStep(
            trainer,
            loss=masked_mean,
            known=partial(known_gradients, microbatches=microbatches),
        ),
        micro_batch=trainer.config.train.micro_batch,
        microbatches=microbatches,
        forward_only=False,
    )
    return _mean(losses)


def update(trainer: Trainer, loss: torch.Tensor | None) -> Outcome:
    """Clip, and write weights and moments where loss and gradients are finite."""
    counted = trainer.backend.counters(trainer.binding.plan.recipes(), trainer.world.device)
    health = StepHealth(
        loss,
        (parameter for chunk in trainer.chunks for parameter in chunk.parameters()),
        carried=torch.cat([trainer.asked.flags, *(n.reshape(1) for n in counted.values())]),
        data_size=trainer.world.data_size,
    )
    return health.outcome(trainer.optimizer.update(health))


@dataclass(frozen=True)
class Evaluated:
    """Mean loss (nats a token) over all tokens of a validation set, and of each of its ``parts``:
    neighbouring sequences, as many in each as can be."""

    loss: float
    parts: list[float]


def evaluate(trainer: Trainer, name: str, *, bf16: bool = False) -> Evaluated:
    """The losses on the validation set ``name``.

    In the run's recipe, or with every linear in BF16. Its microbatches are of the same sequences
    whatever train.micro_batch and the layout are, since a recipe may scale by a whole microbatch.
    """
    trainer.settle()
    recipes = trainer.binding.recipes()
    if bf16:
        trainer.binding.set_recipes([BF16] * len(recipes))
    for chunk in trainer.chunks:
        chunk.eval()
    trainer.clock.step = trainer.step
    trainer.binding.sites.recording = False
    forward = ForwardStep(trainer, loss=masked_sum, first_microbatch=_EVALUATION)
    sequences = len(trainer.data.valid[name])
    sampler = evaluation_sampler(trainer, sequences=sequences)
    with torch.no_grad():
        losses = run_schedule(
            trainer,
            trainer.evaluation_batches(name, sampler),
            forward,
            micro_batch=sampler.micro_batch,
            microbatches=len(sampler.numbers),
            forward_only=True,
        )
    for chunk in trainer.chunks:
        chunk.train()
    trainer.binding.set_recipes(recipes)
    trainer.binding.sites.recording = True
    trainer.clock.weights_changed()  # the next step makes its own casts, and leaves what they leave
    sums = _sums(losses, trainer, sampler, sequences=sequences)
    sums = sums[sums[:, 1] > 0]  # a part may be masked as a whole, alike in all runs
    total, tokens = sums.sum(dim=0).tolist()
    return Evaluated(total / tokens, (sums[:, 0] / sums[:, 1]).tolist())


def evaluation_sampler(trainer: Trainer, *, sequences: int) -> EvaluationSampler:
    """This rank's part of a validation set: microbatches of about _EVALUATION_TOKENS, as many on
    every rank, and in multiples of the stages where the schedule is interleaved."""
    world, config = trainer.world, trainer.config
    micro_batch = max(1, min(_EVALUATION_TOKENS // config.model.seq_length, sequences))
    each = -(-sequences // (micro_batch * world.data_size))
    if config.parallel.virtual_pipeline is not None:
        each = -(-each // config.parallel.pipeline) * config.parallel.pipeline
    return EvaluationSampler(
        micro_batch=micro_batch,
        microbatches=each,
        dp_rank=world.data_rank,
        dp_size=world.data_size,
    )


def run_schedule(
    trainer: Trainer,
    iterators: Sequence[Iterator[Batch] | None],
    forward: ForwardStep,
    *,
    micro_batch: int,
    microbatches: int,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """What ``forward`` recorded of each of this rank's microbatches, after megatron-core's schedule."""
    single = len(trainer.chunks) == 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators[0] if single else list(iterators),
        model=trainer.chunks[0] if single else trainer.chunks,
        num_microbatches=microbatches,
        seq_length=trainer.config.model.seq_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )


def _sums(
    losses: list[dict[str, torch.Tensor]],
    trainer: Trainer,
    sampler: EvaluationSampler,
    *,
    sequences: int,
) -> torch.Tensor:
    """Sums of the losses and numbers of tokens [parts, 2] of a validation set, known to every rank.

    Only the last pipeline stage has losses; the others add zero.
    """
    parts = min(_PARTS, sequences)
    sums = torch.zeros(parts, 2, dtype=torch.float64, device=trainer.world.device)
    places = torch.arange(sampler.micro_batch, device=sums.device)
    for number, entry in zip(sampler.numbers, losses, strict=False):
        # sequences past the last one have no tokens, so their part does not matter
        sequence = (number * sampler.micro_batch + places).clamp(max=sequences - 1)
        sums.index_add_(
            0, sequence * parts // sequences, torch.stack([entry["loss"], entry["tokens"]], dim=1)
        )
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return sums


def _mean(losses: list[dict[str, torch.Tensor]]) -> torch.Tensor | None:
    """Over this rank's microbatches, in float64; None without any."""
    return torch.stack([entry["loss"].double() for entry in losses]).mean() if losses else None
