"""A GEMM of FP8 operands scaled in blocks of 128 along the contraction axis.

Tensor cores multiply 128 products deep, then the partial sum leaves their narrow accumulator, is scaled by
both blocks' factors and added in FP32. So a scale is applied exactly where it holds, and what Hopper's FP8
tensor cores drop while adding (they keep 14 bits) never sees more than 128 products: the promotion of
DeepSeek-V3 (arXiv:2412.19437, sec. 3.3.2). Any GPU that multiplies FP8 runs it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp4_kernels.launch import launch

BLOCK = 128
# Rows of a, rows of b, rows of tiles that share columns in the cache, warps, stages.
TILE = (128, 128, 8, 8, 3)


@triton.jit
def block_gemm_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, out_ptr, M, N, K, out_stride,
    a_scale_stride, a_scale_step, b_scale_stride, b_scale_step,
    B_TALL: tl.constexpr, ACCUMULATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = a @ b.T (+ out) of FP8 [M, K], [N, K] with K a multiple of BK = 128.

    The factor of row m and block k of a is at a_scales[m * stride + k * step], that of b's row n at
    b_scales[n // B_TALL * stride + k * step].
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m0 = (first + program % (GROUP * tiles_n) % height) * BM
    n0 = program % (GROUP * tiles_n) // height * BN
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows past the edge read the last row and are not stored.
    a = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    b = b_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for block in range(0, K // BK):
        part = tl.dot(tl.load(a), tl.load(b))
        sa = tl.load(
            a_scales_ptr + block * a_scale_step + m * a_scale_stride, mask=m < M, other=0.0
        )
        if B_TALL == BN:  # one tile of b: one factor
            sb = tl.load(b_scales_ptr + n0 // B_TALL * b_scale_stride + block * b_scale_step)
            acc += part * (sa * sb)[:, None]
        else:
            sb = tl.load(
                b_scales_ptr + block * b_scale_step + n // B_TALL * b_scale_stride,
                mask=n < N, other=0.0,
            )  # fmt: skip
            acc += part * sa[:, None] * sb[None, :]
        a += BK
        b += BK
    out = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ACCUMULATE:
        acc += tl.load(out, mask=inside, other=0.0)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def block_matmul(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    accumulate: bool = False,
    tile: tuple[int, int, int, int, int] = TILE,
) -> Tensor:
    """``out = a @ b.T (+ out)``.

    Args:
        a: FP8 [m, k], contiguous, k a multiple of 128, and its fp32 factors [m, k / 128]; b: FP8
            [n, k] and factors [n, k / 128] or, for 128x128 tiles, [n / 128, k / 128]. Factors have
            any strides; those of adjacent rows are best adjacent.
        out: [m, n] float32 or bfloat16, its columns adjacent.
    """
    (codes_a, scales_a), (codes_b, scales_b) = a, b
    (m, k), n = codes_a.shape, codes_b.shape[0]
    bm, bn, group, warps, stages = tile
    launch(
        block_gemm_kernel,
        (triton.cdiv(m, bm) * triton.cdiv(n, bn), 1),
        (
            codes_a, scales_a, codes_b, scales_b, out, m, n, k, out.stride(0),
            *scales_a.stride(), *scales_b.stride(),
        ),
        (),
        (n // scales_b.shape[0], accumulate, bm, bn, group, BLOCK),
        warps=warps,
        stages=stages,
        fusion=True,
    )  # fmt: skip
    return out
