"""Cross entropy over a vocabulary that tensor-parallel ranks share, by a kernel that copies no logits.

megatron-core's own makes an FP32 copy of the logits and passes over it eight times. This one needs a GPU
and Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class FusedCrossEntropy(torch.autograd.Function):
    """Losses [s, b] fp32 (nats) of logits [s, b, vocabulary / ranks] for labels int64 [s, b].

    The logits are overwritten with their gradient: nobody else may need them. Collective over ``group``.
    ``known``: the gradient [s, b] that the losses are going to get. With it the forward pass writes the
    logits' gradient as it reads them, and the backward pass compares what arrives with what was known: a
    token's row is scaled once more where they differ, and is NaN where it was known to get none. Only for a
    vocabulary that lies on one rank.
    Source: Megatron-LM's vocabulary-parallel cross entropy (arXiv:1909.08053, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, known: Tensor | None
    ) -> Tensor:
        from fp4_kernels.cross_entropy import token_statistics

        start = group.rank() * logits.shape[-1]
        x_tv, labels_t = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        known_t = None if known is None else known.reshape(-1)
        peak, total, own = token_statistics(x_tv, labels_t, start=start, upstream=known_t)
        if group.size() > 1:
            mine = peak.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * torch.exp(mine - peak), own])
            dist.all_reduce(sums, group=group)
            total, own = sums
        log_total = torch.log(total) + peak
        ctx.save_for_backward(x_tv, labels_t, log_total, known_t)
        ctx.start, ctx.shape = start, logits.shape
        return (log_total - own).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]  # torch's is variadic
        from fp4_kernels.cross_entropy import token_gradients, token_rescale

        x_tv, labels_t, log_total, known_t = ctx.saved_tensors
        upstream_t = upstream.reshape(-1).float().contiguous()
        if known_t is None:
            gradient = token_gradients(x_tv, labels_t, log_total, upstream_t, start=ctx.start)
        else:
            gradient = token_rescale(x_tv, known_t, upstream_t)
        return gradient.view(ctx.shape), None, None, None


def fused_cross_entropy(
    logits: Tensor, labels_bs: Tensor, group: dist.ProcessGroup, *, known_bs: Tensor | None = None
) -> Tensor:
    """As `FusedCrossEntropy`, of labels and known gradients [b, s]; returns [b, s]."""
    known = None
    if known_bs is not None and group.size() == 1 and torch.is_grad_enabled():
        known = known_bs.float().transpose(0, 1).contiguous() if logits.requires_grad else None
    losses_sb: Tensor = FusedCrossEntropy.apply(
        logits.contiguous(), labels_bs.transpose(0, 1).contiguous(), group, known
    )
    return losses_sb.transpose(0, 1).contiguous()
