"""Adam by our kernel in place of PyTorch's fused one: it writes the model's weights with the masters.

An optimizer of megatron-core updates its FP32 masters by ``torch.optim.AdamW``, then copies them to the
model's BF16 weights. Here both are one launch (`fp4_kernels.adam`). State and its names stay PyTorch's, so
checkpoints are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor


class FusedAdam:
    """The update of one of megatron-core's optimizers, ``part``, whose ``optimizer`` is PyTorch's AdamW.

    Calling it is that optimizer's ``step``: with ``grad_scale`` and ``found_inf`` set, learning rates on the
    device and every master's gradient in ``grad``.
    """

    def __init__(self, part: Any) -> None:
        self._part = part
        self._steps: Tensor | None = None  # fp32 [masters]: each state's "step" is a view of it
        self._built: tuple[Any, ...] | None = None
        self._tensors: Any = None
        part.optimizer.step = self
        if not isinstance(part, FP32Optimizer):
            part._copy_main_params_to_model_params = self._written

    def __call__(self) -> None:
        """One step of every master whose gradient is there."""
        from fp4_kernels.adam import Constants, adam

        inner = self._part.optimizer
        self._follow()
        if self._steps is None:
            return
        group = inner.param_groups[0]
        beta1, beta2 = group["betas"]
        self._steps += 1 - inner.found_inf
        count = self._steps.double()
        rate = torch.stack([g["lr"] for g in inner.param_groups]).double()[self._group]
        rates = torch.stack(
            [rate / (1 - beta1**count), (1 - beta2**count).rsqrt(), 1 - rate * self._decay], dim=1
        ).float()
        adam(
            self._tensors,
            rates,
            Constants(beta1, beta2, group["eps"]),
            scale=inner.grad_scale,
            blocked=inner.found_inf,
        )

    def _written(self) -> None:
        """Stands where megatron-core copies masters to weights after a step: the step wrote them."""

    def _follow(self) -> None:
        """Find every tensor anew where one of them has moved: after a checkpoint was loaded."""
        from fp4_kernels.adam import Slot, tensors_of

        inner, weights = self._part.optimizer, dict(self._weights())
        found, slots, groups = [], [], []
        for number, group in enumerate(inner.param_groups):
            for master in group["params"]:
                if master.grad is None:
                    continue
                state = inner.state[master]
                slot = Slot(
                    master,
                    master.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    weights.get(id(master)),
                )
                found += [0 if t is None else t.data_ptr() for t in slot]
                found.append(state["step"].data_ptr())
                slots.append((slot, state))
                groups.append(number)
        if tuple(found) == self._built:
            return
        if not slots:
            self._steps, self._built = None, ()
            return
        device = slots[0][0].master.device
        steps = torch.stack([state["step"].to(device, torch.float32) for _, state in slots])
        for (_, state), view in zip(slots, steps.unbind(), strict=True):
            state["step"] = view
        self._steps = steps
        self._group = torch.tensor(groups, device=device)
        decay = [inner.param_groups[number]["weight_decay"] for number in groups]
        self._decay = torch.tensor(decay, dtype=torch.float64, device=device)
        self._tensors = tensors_of([slot for slot, _ in slots])
        places = [view.data_ptr() for view in steps.unbind()]
        found[5::6] = places
        self._built = tuple(found)

    def _weights(self) -> Iterator[tuple[int, Tensor]]:
        """(id of a master, the BF16 weights that it is the master of): this rank's part of them."""
        part = self._part
        if isinstance(part, FP32Optimizer):
            return
        if not isinstance(part, DistributedOptimizer):
            pairs = zip(part.fp32_from_float16_groups, part.float16_groups, strict=True)
            for masters, models in pairs:
                yield from (
                    (id(a), b.detach().view(-1)) for a, b in zip(masters, models, strict=True)
                )
            return
        pairs = zip(part.shard_fp32_from_float16_groups, part.model_float16_groups, strict=True)
        for masters, models in pairs:
            for master, model in zip(masters, models, strict=True):
                if master is None:
                    continue
                held = part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
                buffer, _, bucket = part.model_param_gbuf_map[model]
                whole = part.buffers[buffer].buckets[bucket].param_data.view(-1)
                yield id(master), whole[held.start : held.end]
