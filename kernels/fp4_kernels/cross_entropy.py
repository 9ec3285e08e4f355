"""Cross entropy over a vocabulary, or a part of it, that reads logits twice and copies them never.

    forward     one read: each token's largest logit, the sum of exponentials under it, its label's logit
    backward    one read and one write: (softmax - one at the label) * upstream gradient, over the logits

Ranks that hold a part of the vocabulary combine the three numbers between the two. Sums are FP32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns a program takes at once
WARPS = 8


@triton.jit
def token_statistics_kernel(x_ptr, labels_ptr, out_ptr, V, start, T, BLOCK: tl.constexpr):
    """out[:, t]: largest logit of x [T, V], sum of exp(x - largest), the label's logit or 0.

    ``start``: the label of column 0. A label of another part has no logit here.
    """
    t = tl.program_id(0).to(tl.int64)
    row = x_ptr + t * V
    peak = -float("inf")
    total = 0.0
    for begin in range(0, V, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    label = tl.load(labels_ptr + t) - start
    here = (label >= 0) & (label < V)
    own = tl.load(row + tl.where(here, label, 0)).to(tl.float32)
    tl.store(out_ptr + t, peak)
    tl.store(out_ptr + T + t, total)
    tl.store(out_ptr + 2 * T + t, tl.where(here, own, 0.0))


@triton.jit
def token_gradients_kernel(
    x_ptr, labels_ptr, log_total_ptr, upstream_ptr, out_ptr, V, start, BLOCK: tl.constexpr
):
    """out[t, v] = (exp(x[t, v] - log_total[t]) - (v is the label)) * upstream[t]; out may be x."""
    t = tl.program_id(0).to(tl.int64)
    log_total = tl.load(log_total_ptr + t)
    upstream = tl.load(upstream_ptr + t)
    label = tl.load(labels_ptr + t) - start
    for begin in range(0, V, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < V
        x = tl.load(x_ptr + t * V + column, mask=inside, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - log_total) - tl.where(column == label, 1.0, 0.0)) * upstream
        tl.store(out_ptr + t * V + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def token_statistics(x: Tensor, labels: Tensor, *, start: int = 0) -> Tensor:
    """fp32 [3, T] of logits x [T, V] (contiguous; bfloat16, float16 or float32) and labels int64 [T].

    Row 0: each token's largest logit; 1: the sum of exp(x - largest); 2: the logit of its label, 0 where
    that is not among ``start`` .. ``start`` + V - 1.
    """
    out = torch.empty(3, x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        token_statistics_kernel[(x.shape[0],)](
            x, labels, out, x.shape[1], start, x.shape[0], BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def token_gradients(
    x: Tensor, labels: Tensor, log_total: Tensor, upstream: Tensor, *, start: int = 0
) -> Tensor:
    """x [T, V], overwritten by the gradient of ``upstream`` [T] times the loss log_total - x[t, label].

    ``log_total`` fp32 [T]: log of the sum of exponentials over the whole vocabulary.
    """
    if x.shape[0]:
        token_gradients_kernel[(x.shape[0],)](
            x, labels, log_total, upstream, x, x.shape[1], start, BLOCK=BLOCK, num_warps=WARPS
        )
    return x
