"""AdamW with FP32 masters and its schedules: megatron-core's, from the run config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fp4pretrain.checks import schedule_steps
from fp4pretrain.config import RunConfig
from fp4pretrain.model.build import fuses
from fp4pretrain.train.guard.update import GuardedOptimizer


def build_optimizer(config: RunConfig, chunks: Sequence[Any]) -> GuardedOptimizer:
    """megatron-core's optimizer over DDP-wrapped chunks: sharded over data-parallel ranks where
    ``parallel.distributed_optimizer`` says so. Weight decay skips norms and biases, and an update
    that is not finite is left out."""
    o = config.optim
    dtype = torch.bfloat16 if o.params_dtype == "bf16" else torch.float32
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_eps=o.eps,
            clip_grad=o.clip,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=any(c.ddp_config.overlap_param_gather for c in chunks),
        ),
        list(chunks),
    )
    guarded = GuardedOptimizer(optimizer, fused=fuses(config))
    _allocate_moments(guarded)
    return guarded


def _allocate_moments(optimizer: GuardedOptimizer) -> None:
    """Adam's moments and step, zero, before the first update: so a checkpoint always holds them, and
    one can be loaded into a run that has made no update."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                device = state["exp_avg"].device if optimizer.on_device else None
                state["step"] = torch.tensor(0.0, device=device)
        else:  # fused ones count in their groups
            for group in part.optimizer.param_groups:
                group["step"] = 0


@torch.no_grad()
def set_elements(optimizer: Any, parameter: Any, mask: torch.Tensor, values: torch.Tensor) -> None:
    """Give a parameter of a model chunk ``values`` where ``mask`` says so, and its FP32 master too, of
    which this data-parallel rank may hold a part or nothing. Moments stay. ``mask`` and ``values`` have
    the parameter's shape; every data-parallel rank gives the same."""
    parameter.data.copy_(torch.where(mask, values, parameter))
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            if parameter not in part.model_param_group_index_map:
                continue
            held = part._get_model_param_range_map(parameter)["param"]
            master = part._get_main_param_and_optimizer_states(parameter)["param"]
            mine = slice(held.start, held.end)
            _set(master, mask.view(-1)[mine], values.view(-1)[mine])
        elif getattr(parameter, "main_param", None) is not None:  # FP32 weights are their own
            _set(parameter.main_param, mask, values)
            return


def _set(master: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> None:
    master.copy_(torch.where(mask, values.to(master.dtype), master))


def build_schedule(config: RunConfig, optimizer: GuardedOptimizer) -> OptimizerParamScheduler:
    """Warmup, then WSD (stable, decay over the last part) or cosine, counted in steps.

    The first update's learning rate is lr / (warmup + 1), not 0; update warmup + 1 has the whole lr.
    """
    o, steps = config.optim, config.train.steps
    warmup, decay = schedule_steps(config)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=o.lr / (warmup + 1),
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style={"wsd": "WSD", "cosine": "cosine"}[o.schedule],
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=max(1, decay) if o.schedule == "wsd" else None,
        lr_wsd_decay_style=o.decay_shape if o.schedule == "wsd" else None,
    )
