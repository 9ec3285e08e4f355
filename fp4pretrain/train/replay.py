"""Training steps captured as a CUDA graph and replayed, so that the GPU does not wait for Python.

    first step of a recipe      rehearsed: run as ever, while every draw of noise asks for a row (`Draws`)
    second step                 captured: forward, backward and update of all microbatches, one graph
    every step from then on     batches copied in, rows filled for the step, the graph replayed

What changes between steps lies on the device: batches, noise keys, redrawn signs, learning rates, whether
the update is written. So a replayed step computes the bits of a plain one. A switch of recipes, and a
loaded checkpoint, begin with a rehearsal again; a step that somebody watches (observers) runs as ever.
A replayed step's numbers are copied to the host behind it, so the next replay may be launched before they are
read: `train_step` says when.
Where a run cannot be captured, ``why_not`` says it in one clause, and every step runs as ever.

Several ranks capture their collectives too, so in every step all of them replay or none: what decides is the
same on each (config, plan, step), and whether a capture worked is asked of all. PyTorch counts no time in
replayed collectives; a rank that is gone is noticed by ``guard.hang_timeout``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.ops import Backend, Draws, handed, watching
from fp4pretrain.ops.choice import ENGINE, TRITON_BACKENDS
from fp4pretrain.parallel.groups import World, let_go_before_leaving
from fp4pretrain.precision import Plan
from fp4pretrain.train.guard.update import Outcome
from fp4pretrain.train.step import forward_backward, update

if TYPE_CHECKING:
    from fp4pretrain.train.trainer import Batch, Trainer

    # Of a rank's model chunks; None for one that reads nothing.
    Iterators = Sequence[Iterator[Batch] | None]
    Batches = list[list[Batch] | None]


def why_not(config: RunConfig, plan: Plan, backend: Backend, *, device: torch.device) -> str | None:
    """None where a run's steps can be captured, otherwise the reason in one clause."""
    m = config.model
    if device.type != "cuda" or torch.version.hip is not None:
        return "CUDA graphs need an NVIDIA GPU"
    if m.implementation != "fp4pretrain":
        return f"modules of {m.implementation} were never captured here"
    if backend.name == ENGINE:
        return f"casts of precision.backend={ENGINE} were never captured here"
    if backend.name not in TRITON_BACKENDS:
        return f"precision.backend={backend.name} draws its noise on the host"
    if m.attention_dropout or m.hidden_dropout:
        return "dropout's generator is the host's"
    if config.data.document_mask:
        return "data.document_mask is asked of every batch on the host"
    specs = [spec for recipe in plan.recipes() for _, _, spec in recipe.operands()]
    if any(spec.amax == "held" for spec in specs):
        return "amax=held measures in some steps and not in others"
    if any(spec.split != "none" and spec.stochastic for spec in specs):
        return "an operand is split and its terms rounded stochastically"
    return None


class Replays:
    """How the steps of one run are computed. ``reason``: why they are not captured, None where they are.

    At most two steps may be asked for before the outcome of the first one is read.
    """

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        self._captured: _Captured | None = None
        self._rehearsed: tuple[tuple[int, ...], Draws, _Inputs] | None = None
        self._ahead: tuple[Iterators, Batches] | None = None
        let_go_before_leaving(self)

    @property
    def whole(self) -> bool:
        """Whether steps are replayed, their updates with them."""
        return self._captured is not None and self._captured.whole

    def step(self, trainer: Trainer, iterators: Iterators) -> Outcome:
        """One step: gradients and update."""
        if self.reason is not None:
            return _plain(trainer, iterators)
        batches = self._next(trainer, iterators)
        if watching.attached is not None:
            return _plain(trainer, _iterators(batches))
        binding = trainer.binding
        # switches of the whole model, since another rank's linears may switch alone
        recipes = (binding.switches, *map(id, binding.recipes()))
        if self._captured is not None and self._captured.recipes != recipes:
            self.forget()
        if self._captured is None:
            if self._rehearsed is None or self._rehearsed[0] != recipes:
                return self._rehearse(trainer, batches, recipes)
            if not self._capture(trainer, batches):
                return _plain(trainer, _iterators(batches))
            assert self._captured is not None
        else:
            self._captured.inputs.copy(batches)
        outcome = self._captured.replay(trainer)
        following = trainer.clock.step + 1
        if following < trainer.config.train.steps:  # the device is busy: read on
            self._ahead = iterators, _read(iterators, trainer.layout.microbatches)
            self._captured.prepare(trainer.clock.seed, following)
        return outcome

    def ready(self, trainer: Trainer) -> bool:
        """Whether the step after ``trainer.step`` would be replayed as the one before it was, with nothing to
        decide on the host: the same on every rank."""
        if not self.whole or watching.attached is not None:
            return False
        binding = trainer.binding
        last = trainer.step >= trainer.config.train.steps
        return not last and not binding.plan.switches(binding.progress, trainer.progress)

    def forget(self) -> None:
        """Drop the captured step: recipes, or the memory that a step reads, have changed."""
        if self._captured is not None:
            self._captured.release()
        self._captured = self._rehearsed = None

    def _capture(self, trainer: Trainer, batches: Batches) -> bool:
        """Capture this step without running it. False where that fails; the reason is printed once.

        Raises UserError there where steps should be captured (``train.graph=always``).
        """
        assert self._rehearsed is not None
        self._rehearsed[2].copy(batches)
        rehearsed, self._rehearsed = self._rehearsed, None
        captured, reason = None, None
        try:
            captured = _Captured(trainer, *rehearsed)
        except RuntimeError as error:  # torch's for what may not be captured, and for memory
            reason = first_line(error)
        if not _everywhere(captured is not None, trainer.world):
            self.reason = reason or "another rank could not capture them"
            if captured is not None:
                captured.release()
            if trainer.config.train.graph == "always":
                raise UserError(f"train.graph: {self.reason}; use train.graph=never") from None
            if trainer.world.is_main:
                print(f"warning: steps are not captured as a CUDA graph: {self.reason}", flush=True)
            return False
        self._captured = captured
        return True

    def _next(self, trainer: Trainer, iterators: Iterators) -> Batches:
        """This step's microbatches; those that were read ahead, unless the run went elsewhere."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is iterators:
            return ahead[1]
        return _read(iterators, trainer.layout.microbatches)

    def _rehearse(self, trainer: Trainer, batches: Batches, recipes: tuple[int, ...]) -> Outcome:
        draws, inputs = Draws(trainer.world.device), _Inputs(batches, trainer.world.device)
        trainer.clock.draws = draws
        try:
            outcome = _plain(trainer, inputs.iterators())
        finally:
            trainer.clock.draws = None
        self._rehearsed = recipes, draws, inputs
        return outcome


def _everywhere(mine: bool, world: World) -> bool:
    """Whether all ranks say yes. Collective."""
    if world.size == 1:
        return mine
    all_ranks = torch.tensor(int(mine), device=world.device)
    dist.all_reduce(all_ranks, op=dist.ReduceOp.MIN)
    return bool(all_ranks)


def _read(iterators: Iterators, microbatches: int) -> Batches:
    """The microbatches of a step, on the host."""
    return [
        None if iterator is None else [next(iterator) for _ in range(microbatches)]
        for iterator in iterators
    ]


def _iterators(batches: Batches) -> list[Iterator[Batch] | None]:
    """One iterator a chunk, as the schedules take them."""
    return [None if held is None else iter(held) for held in batches]


def _plain(trainer: Trainer, iterators: Iterators) -> Outcome:
    loss = forward_backward(trainer, iterators)
    trainer.optimizer.fill_learning_rates()
    trainer.asked.fill()
    return update(trainer, loss)


class _Inputs:
    """The microbatches of a step in device memory that stays."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._held: Batches = [
            None if chunk is None else [{k: v.to(device) for k, v in b.items()} for b in chunk]
            for chunk in batches
        ]

    def copy(self, batches: Batches) -> None:
        """Another step's microbatches in place of those that are there."""
        for held, chunk in zip(self._held, batches, strict=True):
            for mine, batch in zip(held or (), chunk or (), strict=True):
                for key, value in batch.items():
                    mine[key].copy_(value, non_blocking=True)

    def iterators(self) -> list[Iterator[Batch] | None]:
        return _iterators(self._held)


class _Captured:
    """One captured step. ``recipes``: identities of the linears' recipes it was captured with; ``whole``: the
    update is part of it."""

    def __init__(
        self, trainer: Trainer, recipes: tuple[int, ...], draws: Draws, inputs: _Inputs
    ) -> None:
        self.recipes = recipes
        self.inputs = inputs
        self._draws = draws
        self._graph = torch.cuda.CUDAGraph()
        for state in get_cuda_rng_tracker().get_states().values():
            if isinstance(state, torch.Generator):
                self._graph.register_generator_state(state)
        sites = trainer.binding.sites
        cast, multiplied = sites.cast.copy(), sites.multiplied.copy()
        draws.begin()
        trainer.clock.weights_changed()  # casts of before lie outside of the graph
        trainer.clock.draws = draws
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        handed.fresh_zeros()
        self.whole = trainer.optimizer.on_device
        self._loss: torch.Tensor | None = None
        self._outcome: Outcome | None = None
        self._landings: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        try:
            with torch.cuda.graph(
                self._graph,
                stream=torch.cuda.current_stream(),
                capture_error_mode="thread_local",
            ):
                self._loss = forward_backward(trainer, inputs.iterators())
                if self.whole:
                    self._outcome = update(trainer, self._loss)
        finally:
            trainer.clock.draws = None
            handed.fresh_zeros()
            # what this step counted on the host: a replay counts nothing, so it is added after each
            self._cast: Counter[Any] = sites.cast - cast
            self._multiplied: Counter[Any] = sites.multiplied - multiplied
            sites.cast, sites.multiplied = cast, multiplied
        if self._outcome is not None:  # two: one is read while the other is written
            for _ in range(2):
                landing = torch.empty_like(self._outcome.numbers, device="cpu", pin_memory=True)
                self._landings.append((landing, torch.cuda.Event()))

    def release(self) -> None:
        """End the graph at once, even if somebody still holds this object."""
        self._graph.reset()

    def prepare(self, seed: int, step: int) -> None:
        """Work out a later step's draws while this one runs."""
        self._draws.prepare(seed, step)

    def replay(self, trainer: Trainer) -> Outcome:
        """Replay the graph for the current step."""
        self._draws.fill(trainer.clock.seed, trainer.clock.step)
        trainer.optimizer.fill_learning_rates()
        trainer.asked.fill()
        self._graph.replay()
        sites = trainer.binding.sites
        if sites.recording:
            sites.cast.update(self._cast)
            sites.multiplied.update(self._multiplied)
        if self._outcome is None:
            return update(trainer, self._loss)
        landing, ready = self._landings[0]
        self._landings.rotate()
        landing.copy_(self._outcome.numbers, non_blocking=True)
        ready.record()
        return Outcome(landing, self._outcome.data_size, ready)
