"""Core attention on ``scaled_dot_product_attention``: flash or cuDNN kernels, no score matrix.

megatron-core's own core attention without Transformer Engine materializes all scores. Attention
products are never quantized. Soft-capped scores (arXiv:2408.00118) have no such kernel: they are computed
in full, in FP32.

On Hopper cuDNN's kernels are asked for first: PyTorch's own order is another one in some builds, and beside
Transformer Engine, and its flash kernels take 1.9 times as long there (docs/gpu.md).

Document masks (`document_mask`) are added to the scores: no kernel of flash attention takes such a mask, so
that attention over several documents runs on the memory-efficient one, over all pairs of positions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

# What may compute attention, in the order in which it is asked on Hopper; each may refuse a shape.
_ON_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class CoreAttention(torch.nn.Module):
    """Causal softmax(q k^T / sqrt(d)) v, grouped queries included. megatron-core's signature.

    With ``softcap`` c a score s becomes c * tanh(s / c), before the mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.softcap = softcap
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
        """query [s, b, heads, d], key and value [t, b, groups, d] -> [s, b, heads * d].

        Causal always. ``attention_mask``: None, or of `document_mask`, [b, 1, s, s]. Where t > s the
        first t - s positions are those of earlier calls, whose keys and values were kept.
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
            if self.softcap is not None:
                out_bhsd = self._capped(q_bhsd, k_bgsd, v_bgsd, dropout, mask=attention_mask)
            elif attention_mask is not None:
                heads = query.shape[2] // key.shape[2]
                # the kernels that take a mask take no grouped queries
                out_bhsd = F.scaled_dot_product_attention(
                    q_bhsd,
                    k_bgsd.repeat_interleave(heads, dim=1),
                    v_bgsd.repeat_interleave(heads, dim=1),
                    attn_mask=attention_mask,
                    dropout_p=dropout,
                    scale=self.softmax_scale,
                )
            else:
                whole = query.shape[0] == key.shape[0]
                with _kernels(query.device):
                    out_bhsd = F.scaled_dot_product_attention(
                        q_bhsd,
                        k_bgsd,
                        v_bgsd,
                        attn_mask=None if whole else ~_later(query, key),
                        dropout_p=dropout,
                        is_causal=whole,
                        scale=self.softmax_scale,
                        enable_gqa=query.shape[2] != key.shape[2],
                    )
        out_sbn = out_bhsd.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
        return out_sbn.to(dtype)

    def _capped(
        self,
        q_bhsd: torch.Tensor,
        k_bgsd: torch.Tensor,
        v_bgsd: torch.Tensor,
        dropout: float,
        *,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention over soft-capped scores [b, heads, s, t] -> [b, heads, s, d]."""
        assert self.softcap is not None
        heads = q_bhsd.shape[1] // k_bgsd.shape[1]
        k_bhsd, v_bhsd = (t.repeat_interleave(heads, dim=1) for t in (k_bgsd, v_bgsd))
        scale = self.softmax_scale or q_bhsd.shape[-1] ** -0.5
        scores = (q_bhsd @ k_bhsd.transpose(-1, -2)).float() * scale
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is None:
            later = _later(q_bhsd.transpose(0, 2), k_bhsd.transpose(0, 2))
            scores = scores.masked_fill(later, float("-inf"))
        else:
            scores = scores + mask
        weights = scores.softmax(dim=-1)
        return F.dropout(weights, dropout, dropout > 0).to(v_bhsd.dtype) @ v_bhsd


def _kernels(device: torch.device) -> AbstractContextManager[None]:
    """Whose kernels are preferred there."""
    if device.type == "cuda" and torch.version.cuda is not None and _is_hopper(device):
        order: AbstractContextManager[None] = sdpa_kernel(_ON_HOPPER, set_priority=True)
        return order
    return nullcontext()


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def document_mask(documents_bs: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores so that a position sees those of its own document up to itself.

    Args:
        documents_bs: [b, s], equal within a document and different in neighbouring ones.
        dtype: of the queries, as the kernels want it; on a CPU it is FP32, as attention there is.

    Returns:
        [b, 1, s, s]: 0 where row sees column, else -inf. One tensor serves all layers.
    """
    other = documents_bs.unsqueeze(2) != documents_bs.unsqueeze(1)
    positions = documents_bs.transpose(0, 1)
    hidden = other | _later(positions, positions)
    dtype = dtype if hidden.is_cuda else torch.float32
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)


def _later(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Which keys [t, ...] come after which queries [s, ...], the last of the t positions: bool [s, t]."""
    rows, columns = query.shape[0], key.shape[0]
    later = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    return later.triu(1 + columns - rows)
