"""Embeddings whose gradient is added to the main gradient at the rows of the tokens that were read.

PyTorch writes a gradient of the whole vocabulary, which is then read and added. `fp4_kernels.embedding` is
for GPUs with Triton. Where ranks share the vocabulary, megatron-core's embedding stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor

from fp4pretrain.nn.gemms import added_to_main_grad


class EmbeddingFunction(torch.autograd.Function):
    """weight [V, n] at tokens int64 [...]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]  # torch's is variadic
        tokens, weight = ctx.saved_tensors
        main = getattr(weight, "main_grad", None)
        if main is None or main.dtype != torch.float32:
            return None, torch.ops.aten.embedding_dense_backward(
                dy, tokens, weight.shape[0], -1, False
            )
        from fp4_kernels.embedding import embedding_backward

        embedding_backward(tokens.reshape(-1), dy.reshape(-1, dy.shape[-1]).contiguous(), main)
        return None, added_to_main_grad(weight)


class FusedVocabEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding of tokens."""

    def forward(self, input_: Tensor) -> Tensor:
        """int64 [b, s] -> [b, s, n]."""
        if self.tp_group.size() > 1 or self.reduce_scatter_embeddings:
            return super().forward(input_)
        found: Tensor = EmbeddingFunction.apply(input_, self.weight)
        return found


class FusedPositionEmbedding(torch.nn.Embedding):
    """PyTorch's embedding, of positions."""

    def forward(self, input: Tensor) -> Tensor:
        """int64 [b, s] -> [b, s, n]."""
        found: Tensor = EmbeddingFunction.apply(input, self.weight)
        return found


def fuse_embeddings(embedding: Any) -> None:
    """Replace megatron-core's embeddings of tokens and positions by these; it builds its own by name."""
    if type(embedding.word_embeddings) is VocabParallelEmbedding:
        embedding.word_embeddings.__class__ = FusedVocabEmbedding
    positions = getattr(embedding, "position_embeddings", None)
    if type(positions) is torch.nn.Embedding:
        positions.__class__ = FusedPositionEmbedding
