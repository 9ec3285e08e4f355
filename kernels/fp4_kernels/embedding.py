"""The gradient of an embedding's rows, added to their FP32 main gradient in place. A batch has a few
thousand tokens, so only their rows are read and written, and no gradient matrix of the vocabulary's size.

Tokens are sorted. One program for each row of the vocabulary and block of columns adds the gradients of
that row's tokens in the order of the batch, so the sum has the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = (8, 512, 4)  # tokens and columns at once, warps


@triton.jit
def embedding_backward_kernel(
    token_ptr, place_ptr, dy_ptr, main_ptr, T, N, P: tl.constexpr, BN: tl.constexpr
):
    """main[token] += the sum of dy[place] over each token's run in the sorted tokens [T]."""
    i = tl.program_id(0)
    token = tl.load(token_ptr + i)
    before = tl.load(token_ptr + i - 1, mask=i > 0, other=-1)
    if token != before:
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        total = tl.zeros([P, BN], tl.float32)
        begin = i
        more = True
        while more:
            at = begin + tl.arange(0, P)
            own = tl.load(token_ptr + at, mask=at < T, other=-1) == token
            place = tl.load(place_ptr + at, mask=own, other=0)
            inside = own[:, None] & (column < N)[None, :]
            total += tl.load(
                dy_ptr + place[:, None] * N + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            begin += P
            more = tl.sum(own.to(tl.int32), axis=0) == P
        to = main_ptr + token * N + column
        sum_ = tl.sum(total, axis=0) + tl.load(to, mask=column < N, other=0.0)
        tl.store(to, sum_, mask=column < N)


def embedding_backward(tokens: Tensor, dy: Tensor, main: Tensor) -> None:
    """main [V, N] (fp32, contiguous) += dy [T, N] (contiguous) at the rows tokens int64 [T]."""
    count, n = dy.shape
    if not count:
        return
    ordered, places = torch.sort(tokens, stable=True)
    p, bn, warps = TILE
    embedding_backward_kernel[(count, triton.cdiv(n, bn))](
        ordered, places, dy, main, count, n, p, bn, num_warps=warps
    )
