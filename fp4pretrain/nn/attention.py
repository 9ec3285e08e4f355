"""Core attention on ``scaled_dot_product_attention``: flash or cuDNN kernels, no score matrix.

megatron-core's own core attention without Transformer Engine materializes all scores. Attention
products are never quantized.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig


class CoreAttention(torch.nn.Module):
    """Causal softmax(q k^T / sqrt(d)) v, grouped queries included. megatron-core's signature."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Causal always: ``attention_mask`` is megatron-core's and stays None here.
        """
        dtype = query.dtype
        if not query.is_cuda:
            # BF16 attention costs three times FP32's on a CPU without BF16 units.
            query, key, value = query.float(), key.float(), value.float()
        q_bhsd, k_bgsd, v_bgsd = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks hold different heads: each draws from its own stream. Under sequence
        # parallelism megatron-core's block has switched to that stream already.
        own_stream = dropout > 0 and not self.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_stream else nullcontext():
            out_bhsd = F.scaled_dot_product_attention(
                q_bhsd,
                k_bgsd,
                v_bgsd,
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        out_sbn = out_bhsd.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
        return out_sbn.to(dtype)
