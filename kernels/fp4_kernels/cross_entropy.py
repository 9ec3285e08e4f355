"""Cross entropy over a vocabulary, or a part of it, that copies logits never.

    statistics  one read: each token's largest logit, the sum of exponentials under it, its label's logit
    gradients   one read and one write: (softmax - one at the label) * upstream gradient, over the logits
    both        one read and one write, where the upstream gradient is known beforehand: a program reads its
                row a second time from the cache that the first time filled

Ranks that hold a part of the vocabulary combine the three numbers between the first two. Sums are FP32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.arith import near_exp2
from fp4_kernels.device import has_fast_casts

BLOCK = 4096  # columns a program takes at once
WARPS = 8
# The same where a row is read again: the rows of the programs that run at a time have to stay in the cache.
# So many warps that an H100 runs two programs on each of 132 processors: 17 MB for 32,000 bfloat16.
TWICE = (16384, 32)
EACH = tl.constexpr(8)  # columns of a thread, next to each other
_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(
    -1.0e38
)  # under every logit, and finite in base 2: infinities have no difference
# Two numbers closer than this, relative to one, are one that was rounded in two ways.
_SAME = tl.constexpr(2.0**-20)
RESCALED = 16  # tokens whose upstream gradients a program compares


@triton.jit
def _columns(begin, BLOCK: tl.constexpr):
    """[BLOCK / EACH, EACH] columns from ``begin`` on: one row a thread."""
    return begin + tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def _peak_and_total(row, V, BLOCK: tl.constexpr, AGAIN: tl.constexpr, FAST: tl.constexpr):
    """Largest of V logits, its log2(e)-fold, and the sum of exp(x - largest). AGAIN: they will be read again.

    Each thread keeps both numbers of the columns that it read, so threads meet once for a row. The largest is
    kept in base 2 too, rounded: 2^(x * log2(e) - that) is one operation before the hardware's exponential.
    """
    POLICY: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    peaks = tl.full([BLOCK // EACH], _LEAST, tl.float32)
    tops = peaks * _LOG2_E
    totals = tl.zeros([BLOCK // EACH], tl.float32)
    for begin in range(0, V, BLOCK):
        column = _columns(begin, BLOCK)
        x = tl.load(row + column, mask=column < V, other=-float("inf"), eviction_policy=POLICY)
        x = x.to(tl.float32)
        found = tl.max(x, axis=1)
        peaks = tl.maximum(peaks, found)
        higher = tl.maximum(tops, found * _LOG2_E)
        found = tl.sum(near_exp2(tl.fma(x, _LOG2_E, -higher[:, None]), FAST), axis=1)
        totals = tl.fma(totals, near_exp2(tops - higher, FAST), found)
        tops = higher
    top = tl.max(tops, axis=0)
    return tl.max(peaks, axis=0), top, tl.sum(totals * near_exp2(tops - top, FAST), axis=0)


@triton.jit
def token_statistics_kernel(
    x_ptr, labels_ptr, upstream_ptr, out_ptr, V, start, T, BLOCK: tl.constexpr, FAST: tl.constexpr
):
    """out[:, t]: largest logit of x [T, V], sum of exp(x - largest), the label's logit or 0.

    ``start``: the label of column 0. A label of another part has no logit here. ``upstream`` [T]: tokens'
    upstream gradients, with which their rows are overwritten by their gradients; None: x stays.
    """
    t = tl.program_id(0).to(tl.int64)
    row = x_ptr + t * V
    label = tl.load(labels_ptr + t) - start
    here = (label >= 0) & (label < V)
    # read by every thread before any writes: they meet in the sums that come now
    own = tl.load(row + tl.where(here, label, 0)).to(tl.float32)
    peak, top, total = _peak_and_total(row, V, BLOCK, upstream_ptr is not None, FAST)
    tl.store(out_ptr + t, peak)
    tl.store(out_ptr + T + t, total)
    tl.store(out_ptr + 2 * T + t, tl.where(here, own, 0.0))
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr + t)
        share = upstream / total
        for begin in range(0, V, BLOCK):
            column = _columns(begin, BLOCK)
            x = tl.load(row + column, mask=column < V, other=0.0, eviction_policy="evict_first")
            p = near_exp2(tl.fma(x.to(tl.float32), _LOG2_E, -top), FAST) * share
            tl.store(row + column, p.to(x_ptr.dtype.element_ty), mask=column < V)
        tl.debug_barrier()  # the label's gradient over what another thread wrote there
        p = near_exp2(tl.fma(own, _LOG2_E, -top), FAST) * share
        tl.store(row + label, (p - upstream).to(x_ptr.dtype.element_ty), mask=here)


@triton.jit
def token_rescale_kernel(
    x_ptr, known_ptr, upstream_ptr, V, T, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of x [T, V] times upstream / known, where the two are not one number; NaN where known is 0."""
    for step in range(TOKENS):
        t = tl.program_id(0).to(tl.int64) * TOKENS + step
        known = tl.load(known_ptr + t, mask=t < T, other=0.0)
        upstream = tl.load(upstream_ptr + t, mask=t < T, other=0.0)
        same = tl.abs(upstream - known) <= tl.abs(known) * _SAME
        if same == 0:  # NaN too
            for begin in range(0, V, BLOCK):
                column = begin + tl.arange(0, BLOCK)
                at = x_ptr + t * V + column
                x = tl.load(at, mask=column < V).to(tl.float32) * (upstream / known)
                tl.store(at, x.to(x_ptr.dtype.element_ty), mask=column < V)


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


def token_statistics(
    x: Tensor, labels: Tensor, *, start: int = 0, upstream: Tensor | None = None
) -> Tensor:
    """fp32 [3, T] of logits x [T, V] (contiguous; bfloat16, float16 or float32) and labels int64 [T].

    Row 0: each token's largest logit; 1: the sum of exp(x - largest); 2: the logit of its label, 0 where
    that is not among ``start`` .. ``start`` + V - 1. ``upstream`` fp32 [T]: x, the whole vocabulary, is
    overwritten by the gradient of ``upstream`` times the loss.
    """
    out = torch.empty(3, x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        block, warps = (BLOCK, WARPS) if upstream is None else TWICE
        fast = has_fast_casts(x.device)
        arguments = x, labels, upstream, out, x.shape[1], start, x.shape[0]
        token_statistics_kernel[(x.shape[0],)](*arguments, block, fast, num_warps=warps)
    return out


def token_rescale(x: Tensor, known: Tensor, upstream: Tensor) -> Tensor:
    """Gradients x [T, V] that ``token_statistics`` wrote for upstream gradients ``known`` [T], made those of
    ``upstream`` [T], in place. Rows for which both are the same but for rounding are not read.

    A token that was known to have none, and has one, gets NaN.
    """
    tokens, v = x.shape
    if tokens:
        grid = (triton.cdiv(tokens, RESCALED),)
        token_rescale_kernel[grid](x, known, upstream, v, tokens, RESCALED, BLOCK, num_warps=WARPS)
    return x


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
