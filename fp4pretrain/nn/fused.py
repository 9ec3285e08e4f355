"""Norm with the sum before it, activation, and the split of queries, keys and values: one kernel a pass each.

They compute what `Norm`, megatron-core's MLP, its self-attention and its residual additions compute, in FP32
inside and rounded once, on GPUs with Triton; `fp4_kernels` has the kernels. Cross entropy is in `loss`.

    written here                 read by             amaxes left for its casts (`ops.handed`)
    a norm's output              fc1, qkv            plain, rotated
    an activation's output       fc2                 plain, rotated
    activation's gradient        fc1's dy            plain, rotated
    a norm's gradient + sum's    proj's, fc2's dy    plain
    gradients of q, k, v         qkv's dy            plain, rotated; with rotary embeddings none

Linears' biases are added where their sums are read, rounded as sums of their own would be, and the gradients
of biases are summed where their terms are written (`token_sums`).

    bias of      added by                                    its gradient summed by
    proj, fc2    the norm after the residual's addition      that norm's backward pass
    fc1          the activation                              its backward pass
    qkv          a kernel in place; the rotating split       the join of q's, k's and v's gradients
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fp4_kernels.spec import LEFT_TURN
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from fp4pretrain.nn.linear import QuantLinear
from fp4pretrain.nn.norm import Norm
from fp4pretrain.nn.token_sums import TokenSums
from fp4pretrain.ops import handed

if TYPE_CHECKING:
    from fp4pretrain.ops.handed import Awaited


@dataclass(frozen=True)
class NormPass:
    """What is fixed of one call: eps, LayerNorm or RMSNorm, and what the readers of its output and of its
    gradient will ask of them."""

    eps: float
    centered: bool
    awaited: Awaited | None
    awaited_back: Awaited | None


def _measurable(awaited: Awaited | None, x: Tensor) -> Awaited | None:
    """What a norm leaves of its output for x [..., n]: the awaited amaxes, or None where one is rotated over
    sixteen tokens and the kernel leaves none: where they do not divide x's (casts pad such a matrix, and
    measure what they have padded), and where a row is too wide to be kept."""
    from fp4_kernels.norm import KEEP

    n = x.shape[-1]
    rotated = awaited is not None and awaited.turn is not None
    return None if rotated and (x.numel() // n % LEFT_TURN or n > KEEP) else awaited


def _plain(awaited: Awaited | None) -> Awaited | None:
    """What a norm leaves of its gradient: the awaited amaxes, or None where one is rotated. Casts then
    measure both in one pass."""
    return None if awaited is not None and awaited.turn is not None else awaited


class FusedNormFunction(torch.autograd.Function):
    """(norm of t, t) of t = x [..., n] + residual, or of t = x without one, by `fp4_kernels.norm`.

    ``linear_bias``: [n], of the linear that wrote x, or None; beside a residual t has it too. The gradient of
    t that comes from elsewhere is added in the same pass, which also sums the three parameters' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        linear_bias: Tensor | None,
        how: NormPass,
    ) -> tuple[Tensor, Tensor]:
        from fp4_kernels.norm import NormCall, norm

        x_tn = x.reshape(-1, x.shape[-1]).contiguous()  # heads of a split matrix are not
        added = None if residual is None else residual.reshape(x_tn.shape).contiguous()
        leave = how.awaited and how.awaited.leave(x.device)
        call = NormCall(how.eps, how.centered, added, leave, linear_bias)
        out_tn, total_tn, statistics = norm(x_tn, weight, bias, call)
        normed = x_tn if total_tn is None else total_tn
        ctx.save_for_backward(normed, statistics, weight, bias, linear_bias)
        ctx.how, ctx.summed = how, total_tn is not None
        ctx.set_materialize_grads(False)
        # not views: megatron-core wants none between layers
        out, t = (torch.ops.aten._unsafe_view(y_tn, x.shape) for y_tn in (out_tn, normed))
        if how.awaited is not None and leave is not None:
            handed.give(out, how.awaited, leave)
        return out, t

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dt: Tensor | None) -> tuple:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.norm import NormCall, NormGradients, norm_backward

        x_tn, statistics, weight, bias, linear_bias = ctx.saved_tensors
        how: NormPass = ctx.how
        linear_bias = linear_bias if ctx.needs_input_grad[4] else None
        if dy is None:
            db = None if linear_bias is None or dt is None else _sum_to(linear_bias, dt)
            return dt, dt if ctx.summed else None, None, None, db, None
        added = None if dt is None else dt.reshape(x_tn.shape).contiguous()
        leave = how.awaited_back and how.awaited_back.leave(dy.device)
        sums = TokenSums(weight, bias, linear_bias)
        dx = norm_backward(
            x_tn,
            statistics,
            weight,
            dy.reshape(x_tn.shape).contiguous(),
            NormGradients(*sums.out, add=sums.add),
            NormCall(how.eps, how.centered, added, leave),
        )
        if how.awaited_back is not None and leave is not None:
            handed.give(dx, how.awaited_back, leave)
        dx = dx.view(dy.shape)
        return dx, dx if ctx.summed else None, *sums.gradients(), None


def _sum_to(vector: Tensor, dy: Tensor) -> Tensor:
    """The sum of dy [..., n] over all but the last dimension, in the dtype of ``vector`` [n]."""
    return dy.reshape(-1, dy.shape[-1]).sum(0).to(vector.dtype)


class Addend(NamedTuple):
    """What is added to x [s, b, n] before it is normed: ``bias`` [n] or None, and ``residual`` in x's shape.

    ``writer``: the linear that wrote x, whose bias this is, and that reads the gradient of x.
    """

    residual: Tensor
    writer: QuantLinear
    bias: Tensor | None


class FusedNorm(Norm):
    """`Norm` by `fp4_kernels.norm`, up to the width that a program holds.

    ``reader``: the linear that reads its output.
    """

    reader: tuple[QuantLinear, ...] = ()  # none or one: a module would become part of this one
    _ahead: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, addend: Addend | None = None, *, ahead: bool = False) -> Tensor:
        """The norm of x; with ``ahead`` what ``begin`` returns."""
        begun, self._ahead = self._ahead, None
        if begun is not None and begun[0] is x:
            return begun[1]
        if not self.holds(x):
            return super().forward(x)
        residual, writer, linear_bias = addend or (None, None, None)
        how = self._pass(x, writer)
        found: tuple[Tensor, Tensor] = FusedNormFunction.apply(
            x, residual, self.weight, self.bias, linear_bias, how
        )
        out, t = found
        if ahead:
            self._ahead = t, out
        return t if ahead else out

    def holds(self, x: Tensor) -> bool:
        """Whether a program holds a row of x."""
        from fp4_kernels.norm import WIDEST

        return x.shape[-1] <= WIDEST

    def begin(self, x: Tensor, addend: Addend | None = None) -> Tensor:
        """x, or where a program ``holds`` a row its sum with an addend. The same kernel norms it: ``forward``
        returns that norm when it is called with what this returns, and the norm's backward pass adds the
        gradient that other readers of it have."""
        begun = self._ahead is not None and self._ahead[0] is x
        if addend is None and (begun or not self.holds(x)):
            return x
        # called as a module, since hooks gather a module's weights before they are read
        t: Tensor = self(x, addend, ahead=True)
        return t

    def _pass(self, x: Tensor, writer: QuantLinear | None) -> NormPass:
        awaited = _measurable(self.reader[0].awaits("x"), x) if self.reader else None
        back = None if writer is None else _plain(writer.awaits("dy"))
        return NormPass(self.eps, self.bias is not None, awaited, back)


class AddThenNorm:
    """megatron-core's bias-dropout-add, whose sums the ``norm`` that comes next makes.

    With dropout it is megatron-core's. ``writer``: the linear whose output is added.
    """

    def __init__(self, norm: FusedNorm, writer: QuantLinear) -> None:
        self.norm, self.writer = norm, writer

    def __call__(self, training: bool, fused: bool) -> Any:
        """The function of (x and bias, residual, dropout) that megatron-core asks for."""

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            x, bias = x_with_bias
            drops = training and prob > 0
            if drops or residual.dtype != x.dtype or not self.norm.holds(x):
                found: Tensor = get_bias_dropout_add(training, fused)(x_with_bias, residual, prob)
                return self.norm.begin(found)
            return self.norm.begin(x, Addend(residual, self.writer, bias))

        return add


class FusedLayer(TransformerLayer):
    """megatron-core's layer whose first norm hands on its input as the residual, so that one kernel adds the
    residual's gradient and the norm's.

    Where the norm made that input, as the sum of the layer before, this is so already. It has to be so for
    the first layer of a model and of every pipeline stage too: a gradient that is rounded before it is added
    has other bits, and pipeline parallelism would show in them.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's signature."""
        return super().forward(self.input_layernorm.begin(hidden_states), *args, **kwargs)


class ActivationFunction(torch.autograd.Function):
    """`fp4_kernels.activation` of x [..., n] + bias [n] or None (swiglu: [..., 2 n], gate first).

    ``awaited``: what the readers of the output and of the gradient will ask of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        kind: str,
        awaited: tuple[Awaited | None, Awaited | None],
    ) -> Tensor:
        from fp4_kernels.activation import activation

        x_tn = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(x_tn, bias)
        ctx.kind, ctx.awaited = kind, awaited[1]
        leave = awaited[0] and awaited[0].leave(x.device)
        y = activation(x_tn, kind, bias=bias, leave=leave)
        if awaited[0] is not None and leave is not None:
            handed.give(y, awaited[0], leave)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.activation import activation_backward

        x_tn, bias = ctx.saved_tensors
        dy_tn = dy.reshape(x_tn.shape[0], -1).contiguous()
        leave = ctx.awaited and ctx.awaited.leave(dy.device)
        sums = TokenSums(bias if ctx.needs_input_grad[1] else None)
        added = None if bias is None else (bias, sums.first)
        dx = activation_backward(x_tn, dy_tn, ctx.kind, bias=added, leave=leave)
        if leave is not None:
            handed.give(dx, ctx.awaited, leave)
        return dx.view(*dy.shape[:-1], -1), *sums.gradients(), None, None


class FusedMLP(MLP):
    """megatron-core's MLP whose activation, and the addition of fc1's bias before it, are one kernel."""

    kind: str | None = None  # one of `fp4_kernels.activation.KINDS`

    def forward(self, hidden_states: Tensor, per_token_scale: Any = None, **kwargs: Any) -> Any:
        """Input and output [s, b, hidden_size], and the bias that is left to add (None without biases)."""
        if self.kind is None or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale=per_token_scale, **kwargs)
        x, bias = self.linear_fc1(hidden_states)
        awaited = self.linear_fc2.awaits("x"), self.linear_fc1.awaits("dy")
        return self.linear_fc2(ActivationFunction.apply(x, bias, self.kind, awaited))


def fuse_layers(decoder: Any, activation: str) -> None:
    """Replace modules of a decoder's layers by the ones of this file; megatron-core builds some classes by
    name.

    ``activation``: the model's, one of `fp4_kernels.activation.KINDS`. The sum at a layer's end is made by
    the norm that begins the next one, unless that is on another pipeline stage or each layer is recomputed by
    itself. PyTorch then makes it, of the same bits, and sums the gradient of fc2's bias in another order.
    """
    alone = decoder.config.recompute_granularity == "full"
    nexts = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.final_layernorm]
    for layer, following in zip(decoder.layers, nexts, strict=True):
        attention, mlp = layer.self_attention, layer.mlp
        if type(mlp) is MLP:
            mlp.__class__ = FusedMLP
            mlp.kind = activation
        layer.input_layernorm.reader = (attention.linear_qkv,)
        layer.pre_mlp_layernorm.reader = (mlp.linear_fc1,)
        layer.self_attn_bda = AddThenNorm(layer.pre_mlp_layernorm, attention.linear_proj)
        if isinstance(following, FusedNorm) and not alone:
            layer.mlp_bda = AddThenNorm(following, mlp.linear_fc2)


def _overwritten(x: Tensor) -> None:
    """Tell autograd that a kernel has written to x, should anyone have saved it."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


class SplitRotatedFunction(torch.autograd.Function):
    """q, k, v of qkv [s, b, groups, heads + 2, d] + bias [groups * (heads + 2) * d] or None, by
    `fp4_kernels.rope`; ``angles``: fp32 [s, 1 or b, d]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from fp4_kernels.rope import split_rotated

        ctx.save_for_backward(angles, bias)
        q, k, v = split_rotated(qkv, angles, bias=bias)
        if q.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr():
            _overwritten(qkv)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.rope import split_rotated_backward

        angles, bias = ctx.saved_tensors
        sums = TokenSums(bias if ctx.needs_input_grad[1] else None)
        dqkv = split_rotated_backward(dq, dk, dv, angles, sums=sums.first)
        return dqkv, *sums.gradients(), None


class SplitFunction(torch.autograd.Function):
    """q, k, v as views of qkv [s, b, groups, heads + 2, d] (q a copy where heads share keys), whose gradients
    are joined by `fp4_kernels.join`.

    ``bias``: [groups * (heads + 2) * d], added to qkv in place, or None. ``awaited``: what the reader of
    qkv's gradient will ask of it.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, awaited: Awaited | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.awaited = awaited
        ctx.save_for_backward(bias)
        s, b, groups, heads, d = qkv.shape
        if bias is not None:
            from fp4_kernels.bias import add_bias

            add_bias(qkv.view(s * b, -1), bias)
            _overwritten(qkv)
        q = qkv[..., : heads - 2, :].reshape(s, b, groups * (heads - 2), d)
        return q, qkv[..., heads - 2, :], qkv[..., heads - 1, :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.join import join

        (bias,) = ctx.saved_tensors
        leave = ctx.awaited and ctx.awaited.leave(dq.device)
        sums = TokenSums(bias if ctx.needs_input_grad[1] else None)
        dqkv = join(dq, dk, dv, leave=leave, sums=sums.first)
        if leave is not None:
            handed.give(dqkv.view(*dqkv.shape[:2], -1), ctx.awaited, leave)
        return dqkv, *sums.gradients(), None


class FusedSelfAttention(SelfAttention):
    """megatron-core's self-attention that splits queries, keys and values in one kernel a pass, which takes
    their linear's bias too, and rotates queries and keys meanwhile where there are rotary embeddings.

    With a cache of keys, norms of queries and keys, or output gates it is megatron-core's.
    """

    _angles: Tensor | None = None
    _splits = False

    def forward(self, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's signature."""
        angles: Any = kwargs.get("rotary_pos_emb")
        caches = any(kwargs.get(k) is not None for k in ("inference_context", "inference_params"))
        usable = angles is None or (
            isinstance(angles, Tensor) and angles.shape[-1] == self.hidden_size_per_attention_head
        )
        normed = not isinstance(self.q_layernorm, IdentityOp | NoneType)
        if args or caches or not usable or normed:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._angles, self._splits = None if angles is None else angles.squeeze(2), True
        try:
            return super().forward(
                hidden_states, attention_mask, **{**kwargs, "rotary_pos_emb": None}
            )
        finally:
            self._angles, self._splits = None, False

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(q [s, b, heads, d], k and v [s, b, groups, d]), rotated already inside ``forward``."""
        if not self._splits:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, bias = self.linear_qkv.apart(hidden_states)
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv = mixed.view(*mixed.shape[:2], groups, -1, d)
        if self._angles is None:
            return SplitFunction.apply(qkv, bias, self.linear_qkv.awaits("dy"))
        return SplitRotatedFunction.apply(qkv, bias, self._angles)
