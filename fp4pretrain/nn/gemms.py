"""The three GEMMs of a linear layer as one autograd function, whatever their recipe.

    forward    (gather x)  x, w -> y                   saves for wgrad what the recipe says
    backward   dy, w -> dx, its reduction started      then dy, x -> dw, added to the main gradient

It redoes what megatron-core's own function does around its matmuls: the sequence-parallel
all-gather (again in backward, so that only the local shard is saved), dgrad's reduction overlapped
with wgrad, accumulation into the FP32 main gradient, frozen weights.

Everything that waits for the backward pass is saved through autograd, so saved-tensor hooks
(offloading) see it, an in-place change of it is an error, and it is freed after its last use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4pretrain.nn.weights import WeightCache
from fp4pretrain.ops import Backend, Cast, LinearCasts, Operand, SiteState, cast_operands, multiply
from fp4pretrain.parallel.bridge import plain_torch


@dataclass(frozen=True)
class LinearCall:
    """Everything but the tensors of one call: casts by recipe, backend, groups."""

    casts: LinearCasts
    backend: Backend
    weights: WeightCache
    weights_version: int
    tp_group: dist.ProcessGroup
    gather: bool  # sequence parallel: x is a shard of the tokens
    allreduce_dgrad: bool
    training: bool
    sites: SiteState | None = None  # what casts leave behind

    def cast(self, x: Tensor, casts: Sequence[Cast]) -> list[Operand]:
        """Operands of x; scales that other ranks' elements take part in are reduced over them."""
        return cast_operands(
            self.backend,
            x,
            casts,
            amax_group=self.tp_group,
            sites=self.sites,
        )

    def multiply(self, gemm: str, a: Operand, b: Operand, **how: Any) -> Tensor:
        """a @ b.T, one of the three GEMMs; ``how`` as in ``ops.multiply``."""
        chosen = self.casts.recipe.gemm(gemm)
        if self.sites is not None and self.sites.recording:
            first, second = chosen.specs
            site = self.casts.first(gemm).site
            self.sites.multiplied[site, first.format, second.format] += 1
        return multiply(self.backend, a, b, fast_accum=chosen.fast_accum, **how)

    def wgrad_x(self, x_tk: Tensor) -> Operand:
        """wgrad's operand of x [t, k], made in the backward pass and multiplied at once."""
        cast = self.casts.wgrad_x
        if cast.spec.source == "forward":
            return self.wgrad_x_from(self.cast(x_tk, [self.casts.fprop_x])[0], x_tk.shape[1])
        return self.cast(x_tk, [replace(cast, saved=False)])[0]

    def wgrad_x_from(self, fprop_x: Operand, k: int) -> Operand:
        """wgrad's operand of x [t, k] where its source is what fprop multiplied."""
        return self.cast(fprop_x.dequantize()[:, :k], [self.casts.wgrad_x])[0]


class QuantLinearFunction(torch.autograd.Function):
    """y [..., n] = x [..., k] @ weight [n, k].T (+ bias [n]), and both gradients, by a recipe."""

    @staticmethod
    @plain_torch
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall
    ) -> Tensor:
        casts = call.casts
        total = _gather(x, call.tp_group)[0] if call.gather else x
        x_tk = total.reshape(-1, total.shape[-1])
        save = call.training and weight.requires_grad
        save_operand = save and not call.gather
        from_forward = casts.wgrad_x.spec.source == "forward"
        x_casts = [casts.fprop_x] + ([casts.wgrad_x] if save_operand and not from_forward else [])
        x_operands = call.cast(x_tk, x_casts)
        w_operand = call.weights.forward(
            weight, casts, call.weights_version, call.cast, backward_too=call.training
        )
        y_tn = call.multiply("fprop", x_operands[0], w_operand, out_dtype=x.dtype)
        if bias is not None:
            y_tn += bias
        ctx.call, ctx.use_bias, ctx.x_shape = call, bias is not None, x.shape
        ctx.x_dtype = x.dtype
        # x itself is saved only where it must be gathered again (its shard is smaller than a cast
        # of the whole); weight for dgrad's cast of it and its main gradient.
        ctx.saved_x = x_operands[-1].hollow() if save_operand else None
        operand = x_operands[-1].tensors() if save_operand else ()
        ctx.save_for_backward(weight, x if save and call.gather else None, *operand)
        # Not a view: megatron-core's cross entropy works on FP32 logits in place.
        return torch.ops.aten._unsafe_view(y_tn, [*total.shape[:-1], y_tn.shape[-1]])

    @staticmethod
    @plain_torch
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        call: LinearCall = ctx.call
        casts = call.casts
        weight, x, *operand = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dy_tn = dy.reshape(-1, dy.shape[-1])

        # dy's amaxes are reduced over the group that gathers x. They go first: behind the gather
        # they would wait for all of it.
        dy_casts = [casts.dgrad_dy] * need_dx + [casts.wgrad_dy] * need_dw
        dy_operands = call.cast(dy_tn, dy_casts)
        gathering = _gather(x, call.tp_group, wait=False) if x is not None and need_dw else None
        dx = dw = None
        reducing = None
        if need_dx:
            w_operand = call.weights.backward(weight, casts, call.weights_version, call.cast)
            dx_tk = call.multiply("dgrad", dy_operands[0], w_operand, out_dtype=ctx.x_dtype)
            dx, reducing = _reduce(dx_tk, ctx.x_shape, call)
        if need_dw:
            if gathering is not None:
                total, handle = gathering
                handle.wait()
                wgrad_x = call.wgrad_x(total.reshape(-1, total.shape[-1]))
            else:
                wgrad_x = ctx.saved_x.filled(tuple(operand))
                if casts.wgrad_x.spec.source == "forward":
                    wgrad_x = call.wgrad_x_from(wgrad_x, ctx.x_shape[-1])
            dw = _weight_gradient(weight, dy_operands[-1], wgrad_x, call)
        db = dy_tn.sum(dim=0) if ctx.use_bias else None
        if reducing is not None:
            reducing.wait()
        return dx, dw, db, None


def _gather(x: Tensor, group: dist.ProcessGroup, *, wait: bool = True) -> tuple[Tensor, Any]:
    """All shards of x [s / tp, b, k] along the sequence: [s, b, k], and the handle if not waited."""
    total = torch.empty((x.shape[0] * group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    handle = dist.all_gather_into_tensor(total, x.contiguous(), group=group, async_op=not wait)
    return total, handle


def _reduce(dx_tk: Tensor, x_shape: torch.Size, call: LinearCall) -> tuple[Tensor, Any]:
    """Start summing dx over the tensor-parallel ranks: scattered along the sequence, or in place."""
    if call.gather:
        dx = torch.empty(x_shape, dtype=dx_tk.dtype, device=dx_tk.device)
        handle = dist.reduce_scatter_tensor(
            dx.view(-1, x_shape[-1]), dx_tk, group=call.tp_group, async_op=True
        )
        return dx, handle
    handle = None
    if call.allreduce_dgrad:
        handle = dist.all_reduce(dx_tk, group=call.tp_group, async_op=True)
    return dx_tk.view(x_shape), handle


def _weight_gradient(weight: Any, dy: Any, x: Any, call: LinearCall) -> Tensor | None:
    """dw [n, k]; a dummy where megatron-core's DDP made ``weight.main_grad`` (FP32), to which it is added."""
    product = partial(call.multiply, "wgrad", dy, x)
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return product(out_dtype=weight.dtype)
    if main_grad.dtype == torch.float32:
        product(out_dtype=torch.float32, accumulate_into=main_grad)
    else:
        main_grad.add_(product(out_dtype=main_grad.dtype))
    return added_to_main_grad(weight)


def added_to_main_grad(parameter: Any) -> Tensor:
    """What autograd is given for a parameter whose gradient stands in ``main_grad`` already.

    A dummy that DDP knows not to add (``grad_added_to_main_grad``); autograd needs one to fire the hooks that
    start the gradient's reduction.
    """
    parameter.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
    return make(parameter)
