"""The optimizer's update, held back where the loss or a gradient is NaN or Inf.

megatron-core's ``step`` prepares the gradients, takes their norm, clips, and only then writes weights,
masters and state in ``step_with_ready_grads``. The norm is NaN or Inf wherever a gradient is, and all
ranks know it, so asking there costs no second pass. Two things it does not hold:

- Gradients that the norm leaves out because another rank counts the same tensor (norm weights under
  tensor parallelism, a tied head): their own ranks look at them.
- The loss. It is reduced together with what those ranks found, in one collective, before the update.

Where PyTorch's Adam or ours runs on GPUs, the norm, the clipping and the decision stay on the device, as
inputs of one fused kernel: the host waits once a step, for the row's numbers (``Outcome``), and the update
may be captured in a CUDA graph. Elsewhere (CPU, apex, Transformer Engine) the host decides, by
megatron-core's own functions.

A skipped step changes neither weights nor optimizer state; the step count, the schedule, the data
position and the tokens go on, as in Megatron-LM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from fp4pretrain.train.fused_adam import FusedAdam


class StepHealth:
    """The loss of a step, known to all ranks, and whether its update may be written.

    Collective: every rank makes one after backward, before the optimizer's step. ``loss`` is this
    rank's mean over its microbatches, None on pipeline stages that have none. ``carried`` [n] (fp64):
    numbers of this rank that are added up over the ranks on the way.
    """

    def __init__(
        self,
        loss: torch.Tensor | None,
        parameters: Iterable[Any],  # Parameters with megatron-core's attributes
        *,
        carried: torch.Tensor,
        data_size: int,
    ) -> None:
        self._data_size = data_size
        mine = torch.cat([carried.new_zeros(2), carried])
        # tensor-parallel ranks hold the same loss: the first of them speaks for all
        if loss is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            mine[0] = loss
        uncounted = [p.main_grad for p in parameters if not _in_the_norm(p)]
        if uncounted:
            mine[1] = ~torch.isfinite(torch.nn.utils.get_total_norm(uncounted))
        dist.all_reduce(mine)
        self._reduced = mine

    def finite(self, grad_norm: float) -> bool:
        """Whether the loss, the norm and the gradients outside of it are finite, on every rank. Waits."""
        loss, uncounted = self._reduced[:2].tolist()
        return math.isfinite(grad_norm) and math.isfinite(loss) and not uncounted

    def finite_on_device(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """``finite`` of a norm that is on the device, without waiting for it: a bool scalar."""
        whole = torch.isfinite(grad_norm) & torch.isfinite(self._reduced[0])
        return whole & (self._reduced[1] == 0)

    def outcome(self, grad_norm: torch.Tensor) -> Outcome:
        """What the step leaves, with its norm (fp32 scalar, on any device)."""
        norm = grad_norm.to(self._reduced.device, torch.float64).reshape(1)
        return Outcome(torch.cat([norm, self._reduced]), self._data_size)


@dataclass(frozen=True)
class Numbers:
    """A step on the host.

    ``loss``: mean over microbatches and data-parallel ranks (nats a token). ``grad_norm``: of all gradients
    before clipping, NaN where a gradient that it leaves out is not finite. ``carried``: sums over ranks.
    """

    loss: float
    grad_norm: float
    carried: list[float]


@dataclass(frozen=True)
class Outcome:
    """What a step leaves, before anybody reads it.

    ``numbers`` (fp64): norm, sum of losses, gradients outside of the norm that are not finite, what was
    carried.
    ``ready``: when they are there, for numbers that a device copies to the host; None: reading waits.
    """

    numbers: torch.Tensor
    data_size: int
    ready: torch.cuda.Event | None = None

    def read(self) -> Numbers:
        """The numbers on the host. Waits for the step."""
        if self.ready is not None:
            self.ready.synchronize()
        norm, loss, uncounted, *carried = self.numbers.tolist()
        return Numbers(loss / self.data_size, math.nan if uncounted else norm, carried)


class GuardedOptimizer(ChainedOptimizer):
    """megatron-core's optimizer, which writes nothing where a step's loss or gradients are not finite.

    ``on_device``: it decides, clips and updates without the host; ``fused``: then by our kernel
    (`FusedAdam`). ``learning_rate``: the group's, as the schedule set it.
    """

    def __init__(self, optimizer: ChainedOptimizer, *, fused: bool = False) -> None:
        super().__init__(optimizer.chained_optimizers)
        self._may_write: Callable[[float], bool] = math.isfinite
        self._grad_norm: float = 0.0
        self._inner = [part.optimizer for part in self.chained_optimizers if part.optimizer]
        self.on_device = all(_fuses(inner) for inner in self._inner)
        self._rates: list[torch.Tensor] = []
        if self.on_device:
            device = torch.cuda.current_device()
            self._rates = [torch.zeros((), device=device) for _ in self._groups()]
            self._settle()
            if fused:
                for part in self.chained_optimizers:
                    if part.optimizer:
                        FusedAdam(part)

    @property
    def learning_rate(self) -> float:
        return float(self.param_groups[0]["lr"])

    def update(self, health: StepHealth) -> torch.Tensor:
        """Clip and write, or leave everything as it is where ``health`` or the norm says so.

        Returns the norm of all gradients before clipping, fp32 scalar; on the device where ``on_device``.
        """
        if self.on_device:
            return self._update_on_device(health)
        self._may_write = health.finite
        _, grad_norm, _ = self.step()
        return torch.tensor(float(grad_norm))

    def get_grad_norm(self) -> float:
        """The norm of all gradients, as megatron-core computes it."""
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Write, or leave everything as it is and return False."""
        return self._may_write(float(self._grad_norm)) and bool(super().step_with_ready_grads())

    def fill_learning_rates(self) -> None:
        """Hand the schedule's learning rates to the device: before ``update``, also a replayed one."""
        if not self.on_device:
            return
        for rate, group in zip(self._rates, self._groups(), strict=True):
            rate.fill_(group["lr"])

    def load_state_dict(self, state_dict: Any) -> None:
        """megatron-core's; state that Adam keeps on the host elsewhere goes to the device."""
        super().load_state_dict(state_dict)
        if self.on_device:
            self._settle()

    def _settle(self) -> None:
        """Adam's settings and its counts of steps as its fused, capturable kernel wants them."""
        for inner in self._inner:
            for group in inner.param_groups:
                group.update(fused=True, foreach=False, capturable=True)
            for state in inner.state.values():
                if "step" in state:
                    state["step"] = state["step"].to(state["exp_avg"].device, torch.float32)

    @torch.no_grad()
    def _update_on_device(self, health: StepHealth) -> torch.Tensor:
        self.prepare_grads()
        norm = self._norm_on_device()
        clip = self.config.clip_grad
        # Adam divides gradients by this scale, which clips them. It has no effect where the update is blocked
        scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm)
        blocked = (~health.finite_on_device(norm)).float()
        for inner in self._inner:
            inner.grad_scale, inner.found_inf = scale, blocked
        scheduled = [group["lr"] for group in self._groups()]
        for rate, group in zip(self._rates, self._groups(), strict=True):
            group["lr"] = rate
        try:
            super().step_with_ready_grads()
        finally:
            for rate, group in zip(scheduled, self._groups(), strict=True):
                group["lr"] = rate
        return norm

    def _norm_on_device(self) -> torch.Tensor:
        """As megatron-core's, which reads one number a parameter from the device."""
        gradients = [
            parameter.grad
            for part in self.chained_optimizers
            for parameter in part.get_parameters()
            if parameter.grad is not None and _in_the_norm(parameter)
        ]
        squared = torch.zeros((), device=torch.cuda.current_device())
        if gradients:
            squared = torch.nn.utils.get_total_norm(gradients, foreach=True).square()
        dist.all_reduce(squared, group=self.get_grad_stats_parallel_group())
        return squared.sqrt()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for inner in self._inner for group in inner.param_groups]


def _fuses(inner: torch.optim.Optimizer) -> bool:
    """Whether it is PyTorch's Adam on a GPU, whose fused kernel takes a scale and a flag to do nothing."""
    parameters = [p for group in inner.param_groups for p in group["params"]]
    return isinstance(inner, torch.optim.Adam) and all(p.is_cuda for p in parameters)


def _in_the_norm(parameter: Any) -> bool:
    return bool(
        param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    )
