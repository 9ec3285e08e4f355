"""Norm, activation and rotary embeddings as one kernel a pass each, and the modules that use them.

They compute what `Norm`, megatron-core's MLP and its self-attention compute, in FP32 inside and rounded
once, on GPUs with Triton; `fp4_kernels` has the kernels. Cross entropy is in `loss`.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from fp4pretrain.nn.norm import Norm


class FusedNormFunction(torch.autograd.Function):
    """`fp4_kernels.norm` of x [..., n]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
    ) -> Tensor:
        from fp4_kernels.norm import norm

        x_tn = x.reshape(-1, x.shape[-1]).contiguous()  # heads of a split matrix are not
        ctx.save_for_backward(x_tn, weight)
        ctx.eps, ctx.centered, ctx.has_bias = eps, centered, bias is not None
        return norm(x_tn, weight, bias, eps=eps, centered=centered).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.norm import norm_backward

        x_tn, weight = ctx.saved_tensors
        dx, dw, db = norm_backward(
            x_tn,
            weight,
            dy.reshape(x_tn.shape).contiguous(),
            eps=ctx.eps,
            centered=ctx.centered,
            has_bias=ctx.has_bias,
        )
        return (
            dx.view(dy.shape),
            dw.to(weight.dtype),
            None if db is None else db.to(weight.dtype),
            None,
            None,
        )


class FusedNorm(Norm):
    """`Norm` by `fp4_kernels.norm`, up to the width that a program holds."""

    def forward(self, x: Tensor) -> Tensor:
        from fp4_kernels.norm import WIDEST

        if x.shape[-1] > WIDEST:
            return super().forward(x)
        centered = self.bias is not None
        found: Tensor = FusedNormFunction.apply(x, self.weight, self.bias, self.eps, centered)
        return found


class SwigluFunction(torch.autograd.Function):
    """silu(gate) * up of x [..., 2 n], gate first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from fp4_kernels.swiglu import swiglu

        x_tn = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(x_tn)
        return swiglu(x_tn).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.swiglu import swiglu_backward

        (x_tn,) = ctx.saved_tensors
        dy_tn = dy.reshape(x_tn.shape[0], -1).contiguous()
        return swiglu_backward(x_tn, dy_tn).view(*dy.shape[:-1], -1)


class FusedMLP(MLP):
    """megatron-core's MLP whose SwiGLU is one kernel."""

    def forward(self, hidden_states: Tensor, per_token_scale: Any = None, **kwargs: Any) -> Any:
        """Input and output [s, b, hidden_size], and the bias that is left to add (None)."""
        c = self.config
        swiglu = c.gated_linear_unit and c.activation_func == torch.nn.functional.silu
        if not swiglu or per_token_scale is not None or c.add_bias_linear:
            return super().forward(hidden_states, per_token_scale=per_token_scale, **kwargs)
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(SwigluFunction.apply(gate_up))


def fuse_mlp(module: Any) -> None:
    """Make megatron-core's MLP a `FusedMLP`: its layer knows the classes that it builds by name."""
    if type(module) is MLP:
        module.__class__ = FusedMLP


class SplitRotatedFunction(torch.autograd.Function):
    """q, k, v of qkv [s, b, groups, heads + 2, d] by `fp4_kernels.rope`; ``angles``: fp32 [s, 1 or b, d]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from fp4_kernels.rope import split_rotated

        ctx.save_for_backward(angles)
        return split_rotated(qkv, angles)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.rope import split_rotated_backward

        (angles,) = ctx.saved_tensors
        return split_rotated_backward(dq, dk, dv, angles), None


class FusedSelfAttention(SelfAttention):
    """megatron-core's self-attention that splits and rotates queries and keys in one kernel.

    It does so where it trains or evaluates with rotary embeddings. With a cache of keys, or norms of
    queries and keys between the split and the rotation, it is megatron-core's.
    """

    _angles: Tensor | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's signature."""
        angles: Any = kwargs.get("rotary_pos_emb")
        caches = any(kwargs.get(k) is not None for k in ("inference_context", "inference_params"))
        usable = (
            isinstance(angles, Tensor) and angles.shape[-1] == self.hidden_size_per_attention_head
        )
        normed = not isinstance(self.q_layernorm, IdentityOp | NoneType)
        if args or caches or not usable or normed:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._angles = angles.squeeze(2)
        try:
            return super().forward(
                hidden_states, attention_mask, **{**kwargs, "rotary_pos_emb": None}
            )
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(q [s, b, heads, d], k and v [s, b, groups, d]), rotated already inside ``forward``."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _ = self.linear_qkv(hidden_states)
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv = mixed.view(*mixed.shape[:2], groups, -1, d)
        return SplitRotatedFunction.apply(qkv, self._angles)
