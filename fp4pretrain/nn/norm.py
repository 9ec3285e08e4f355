"""RMSNorm and LayerNorm that know sequence parallelism.

megatron-core's torch norm refuses sequence parallelism. Under it every rank normalizes its own
tokens, so the weight's gradient is a partial sum: the ``sequence_parallel`` mark makes megatron-core
all-reduce it with the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig


class Norm(torch.nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, by ``config.normalization``.

    Input and output [..., hidden_size]; statistics in FP32. The signature is megatron-core's.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(
                torch.zeros(hidden_size, dtype=config.params_dtype, device=device)
            )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[-1],)
        if self.bias is not None:
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, shape, self.weight, self.eps)
