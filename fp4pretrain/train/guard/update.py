"""The optimizer's update, held back where the loss or a gradient is NaN or Inf.

megatron-core's ``step`` prepares the gradients, takes their norm, clips, and only then writes weights,
masters and state in ``step_with_ready_grads``. The norm is NaN or Inf wherever a gradient is, and all
ranks know it, so asking there costs no second pass. Two things it does not hold:

- Gradients that the norm leaves out because another rank counts the same tensor (norm weights under
  tensor parallelism, a tied head): their own ranks look at them.
- The loss. It used to be reduced and read after the update; now before, together with what those
  ranks found, in one collective in place of two. It is on its way while the norm is taken, and
  reading both makes the host wait once.

A skipped step changes neither weights nor optimizer state; the step count, the schedule, the data
position and the tokens go on, as in Megatron-LM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


class GuardedOptimizer(ChainedOptimizer):
    """megatron-core's optimizer, which asks ``may_write(grad_norm)`` before it writes anything.

    Its ``step`` returns False first where the answer was no.
    """

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        super().__init__(optimizer.chained_optimizers)
        self.may_write: Callable[[float], bool] = math.isfinite
        self._grad_norm: float = 0.0

    def get_grad_norm(self) -> float:
        """The norm of all gradients, as megatron-core computes it."""
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Write, or leave everything as it is and return False."""
        return self.may_write(float(self._grad_norm)) and bool(super().step_with_ready_grads())


class StepHealth:
    """The loss of a step, known to all ranks, and whether its update may be written.

    Collective: every rank makes one after backward, before the optimizer's step. ``loss`` is this
    rank's mean over its microbatches, None on pipeline stages that have none.
    """

    def __init__(
        self,
        loss: torch.Tensor | None,
        parameters: Iterable[Any],  # Parameters with megatron-core's attributes
        *,
        device: torch.device,
        data_size: int,
    ) -> None:
        self._data_size = data_size
        mine = torch.zeros(2, dtype=torch.float64, device=device)
        # tensor-parallel ranks hold the same loss: the first of them speaks for all
        if loss is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            mine[0] = loss
        uncounted = [p.main_grad for p in parameters if not _in_the_norm(p)]
        if uncounted:
            mine[1] = ~torch.isfinite(torch.nn.utils.get_total_norm(uncounted))
        dist.all_reduce(mine)
        self._reduced = mine
        self._read: list[float] | None = None

    @property
    def loss(self) -> float:
        """Mean over microbatches and data-parallel ranks (nats a token)."""
        return self._values()[0] / self._data_size

    def finite(self, grad_norm: float) -> bool:
        """Whether the loss, the norm and the gradients outside of it are finite, on every rank."""
        return math.isfinite(self.norm(grad_norm)) and math.isfinite(self.loss)

    def norm(self, grad_norm: float) -> float:
        """``grad_norm``, NaN where a gradient that it leaves out is not finite."""
        return math.nan if self._values()[1] else grad_norm

    def _values(self) -> list[float]:
        if self._read is None:
            self._read = self._reduced.tolist()
        return self._read


def _in_the_norm(parameter: Any) -> bool:
    return bool(
        param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    )
