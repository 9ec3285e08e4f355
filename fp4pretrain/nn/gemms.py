"""The three GEMMs of a linear layer as one autograd function, whatever their recipe.

    forward    (gather x)  x, w -> y                   saves for wgrad what the recipe says
    backward   dy, w -> dx, its reduction started      then dy, x -> dw, added to the main gradient

It redoes what megatron-core's own function does around its matmuls: the sequence-parallel
all-gather (again in backward, so that only the local shard is saved), dgrad's reduction overlapped
with wgrad, accumulation into the FP32 main gradient, frozen weights.

Everything that waits for the backward pass is saved through autograd, so saved-tensor hooks
(offloading) see it, an in-place change of it is an error, and it is freed after its last use.

Where a plan divides attention's projections, a linear is several calls, each with some rows of the weight
and a recipe: x is gathered once and cast once for each recipe, every call makes its rows of y and of dw,
and dx is the sum of the calls' products, in FP32.
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
    """Everything but the tensors of one call: casts by recipe, backend, groups.

    ``rows``: int64, the rows of the weight (and so the columns of y) that the call is about; None: all.
    Calls of one linear differ in casts, weights and rows.
    """

    casts: LinearCasts
    backend: Backend
    weights: WeightCache
    weights_version: int
    tp_group: dist.ProcessGroup
    gather: bool  # sequence parallel: x is a shard of the tokens
    allreduce_dgrad: bool
    training: bool
    sites: SiteState | None = None  # what casts leave behind
    rows: Tensor | None = None

    def of(self, x: Tensor, dim: int) -> Tensor:
        """The part of x that the call is about, where ``dim`` counts output features."""
        return x if self.rows is None else x.index_select(dim, self.rows)

    def cast(
        self, x: Tensor, casts: Sequence[Cast], partners: Sequence[Operand | None] = ()
    ) -> list[Operand]:
        """Operands of x; scales that other ranks' elements take part in are reduced over them.

        ``partners``: what each will be multiplied with, as far as that exists (`ops.Backend.quantize`)."""
        return cast_operands(
            self.backend,
            x,
            casts,
            amax_group=self.tp_group,
            sites=self.sites,
            partners=partners,
        )

    def multiply(self, gemm: str, a: Operand, b: Operand, **how: Any) -> Tensor:
        """a @ b.T, one of the three GEMMs; ``how`` as in ``ops.multiply``."""
        chosen = self.casts.recipe.gemm(gemm)
        if self.sites is not None and self.sites.recording:
            first, second = chosen.specs
            site = self.casts.first(gemm).site
            self.sites.multiplied[site, first.format, second.format] += 1
        return multiply(self.backend, a, b, fast_accum=chosen.fast_accum, **how)

    def wgrad_x(self, x_tk: Tensor, dy: Operand) -> Operand:
        """wgrad's operand of x [t, k], made in the backward pass and multiplied at once with ``dy``."""
        cast = self.casts.wgrad_x
        if cast.spec.source == "forward":
            return self.wgrad_x_from(self.cast(x_tk, [self.casts.fprop_x])[0], x_tk.shape[1])
        return self.cast(x_tk, [replace(cast, saved=False)], [dy])[0]

    def wgrad_x_from(self, fprop_x: Operand, k: int) -> Operand:
        """wgrad's operand of x [t, k] where its source is what fprop multiplied."""
        return self.cast(fprop_x.dequantize()[:, :k], [self.casts.wgrad_x])[0]


class QuantLinearFunction(torch.autograd.Function):
    """y [..., n] = x [..., k] @ weight [n, k].T (+ bias [n]), and both gradients, by recipes.

    ``calls``: one, or those whose rows make up the weight.
    """

    @staticmethod
    @plain_torch
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, calls: Sequence[LinearCall]
    ) -> Tensor:
        first = calls[0]
        total = _gather(x, first.tp_group)[0] if first.gather else x
        x_tk = total.reshape(-1, total.shape[-1])
        save = first.training and weight.requires_grad
        save_operand = save and not first.gather
        y_tn, kept = None, []
        for call in calls:
            y_part, x_operand = _forward(call, x_tk, weight, save=save_operand)
            kept.append(x_operand)
            if call.rows is None:
                y_tn = y_part
            else:
                y_tn = x_tk.new_empty(len(x_tk), len(weight)) if y_tn is None else y_tn
                y_tn.index_copy_(1, call.rows, y_part)
        assert y_tn is not None
        if bias is not None:
            y_tn += bias
        ctx.calls, ctx.use_bias, ctx.x_shape = calls, bias is not None, x.shape
        ctx.x_dtype = x.dtype
        # x itself is saved only where it must be gathered again (its shard is smaller than a cast
        # of the whole); weight for dgrad's cast of it and its main gradient.
        ctx.saved_x = [operand.hollow() for operand in kept] if save_operand else None
        operands = [t for operand in kept for t in operand.tensors()] if save_operand else ()
        ctx.save_for_backward(weight, x if save and first.gather else None, *operands)
        # Not a view: megatron-core's cross entropy works on FP32 logits in place.
        return torch.ops.aten._unsafe_view(y_tn, [*total.shape[:-1], y_tn.shape[-1]])

    @staticmethod
    @plain_torch
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        calls: Sequence[LinearCall] = ctx.calls
        first = calls[0]
        weight, x, *saved = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dy_tn = dy.reshape(-1, dy.shape[-1])

        saved_x: list[Operand | None] = [None] * len(calls)
        if ctx.saved_x is not None and need_dw:
            for number, hollow in enumerate(ctx.saved_x):
                count = len(hollow.tensors())
                saved_x[number], saved = hollow.filled(tuple(saved[:count])), saved[count:]

        # dy's amaxes are reduced over the group that gathers x. They go first: behind the gather
        # they would wait for all of it.
        w_operands, dy_operands = [], []
        for call, x_operand in zip(calls, saved_x, strict=True):
            casts: list[Cast] = []
            partners: list[Operand | None] = []
            if need_dx:
                w_operands.append(
                    call.weights.backward(weight, call.casts, call.weights_version, call.cast)
                )
                casts, partners = [call.casts.dgrad_dy], [w_operands[-1]]
            if need_dw:
                casts, partners = [*casts, call.casts.wgrad_dy], [*partners, x_operand]
            dy_operands.append(call.cast(call.of(dy_tn, 1), casts, partners))
        gathering = _gather(x, first.tp_group, wait=False) if x is not None and need_dw else None
        dx = dw = None
        reducing = None
        if need_dx:
            dx_tk = _input_gradient(calls, [one[0] for one in dy_operands], w_operands, ctx.x_dtype)
            w_operands.clear()
            dx, reducing = _reduce(dx_tk, ctx.x_shape, first)
        if need_dw:
            total = None
            if gathering is not None:
                total, handle = gathering
                handle.wait()
                total = total.reshape(-1, total.shape[-1])
            for number, call in enumerate(calls):
                dy_operand, wgrad_x = dy_operands[number][-1], saved_x[number]
                if wgrad_x is None:
                    assert total is not None
                    wgrad_x = call.wgrad_x(total, dy_operand)
                elif call.casts.wgrad_x.spec.source == "forward":
                    wgrad_x = call.wgrad_x_from(wgrad_x, ctx.x_shape[-1])
                dw = _weight_gradient(weight, dy_operand, wgrad_x, call, dw)
        db = dy_tn.sum(dim=0) if ctx.use_bias else None
        if reducing is not None:
            reducing.wait()
        return dx, dw, db, None


def _forward(
    call: LinearCall, x_tk: Tensor, weight: Tensor, *, save: bool
) -> tuple[Tensor, Operand]:
    """One call's y [t, n], and the operand of x that waits for the backward pass if ``save``."""
    casts = call.casts
    from_forward = casts.wgrad_x.spec.source == "forward"
    x_casts = [casts.fprop_x] + ([casts.wgrad_x] if save and not from_forward else [])
    w_operand = call.weights.forward(
        weight, casts, call.weights_version, call.cast, backward_too=call.training
    )
    x_operands = call.cast(x_tk, x_casts, [w_operand, None][: len(x_casts)])
    return call.multiply("fprop", x_operands[0], w_operand, out_dtype=x_tk.dtype), x_operands[-1]


def _input_gradient(
    calls: Sequence[LinearCall], dy: Sequence[Operand], w: Sequence[Operand], dtype: torch.dtype
) -> Tensor:
    """dx [t, k]: the product of dy and w, or the sum of those of all calls."""
    alone = len(calls) == 1
    dx_tk = None
    for call, dy_operand, w_operand in zip(calls, dy, w, strict=True):
        dx_tk = call.multiply(
            "dgrad",
            dy_operand,
            w_operand,
            out_dtype=dtype if alone else torch.float32,
            accumulate_into=dx_tk,
        )
    assert dx_tk is not None
    return dx_tk.to(dtype)


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


def _weight_gradient(
    weight: Any, dy: Any, x: Any, call: LinearCall, earlier: Tensor | None
) -> Tensor | None:
    """dw [n, k]; a dummy where megatron-core's DDP made ``weight.main_grad`` (FP32), to which it is added.

    ``earlier``: what the linear's calls before this one returned, whose rows this one leaves alone.
    """
    product = partial(call.multiply, "wgrad", dy, x)
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        found = product(out_dtype=weight.dtype)
        if call.rows is None:
            return found
        dw = torch.empty_like(weight) if earlier is None else earlier
        return dw.index_copy_(0, call.rows, found)
    if main_grad.dtype == torch.float32:
        rows = call.of(main_grad, 0)
        product(out_dtype=torch.float32, accumulate_into=rows)
    else:
        rows = call.of(main_grad, 0).add_(product(out_dtype=main_grad.dtype))
    if call.rows is not None:
        main_grad.index_copy_(0, call.rows, rows)
    return added_to_main_grad(weight) if earlier is None else earlier


def added_to_main_grad(parameter: Any) -> Tensor:
    """What autograd is given for a parameter whose gradient stands in ``main_grad`` already.

    A dummy that DDP knows not to add (``grad_added_to_main_grad``); autograd needs one to fire the hooks that
    start the gradient's reduction.
    """
    parameter.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
    return make(parameter)
