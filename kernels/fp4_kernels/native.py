"""A GEMM on packed FP4 or FP8 codes and their block scales, for tensor cores that scale blocks themselves.

One source, whose product ``tl.dot_scaled`` becomes, by the GPU it is compiled for:

    B200 (sm_100), E4M3 scales of 16    tcgen05.mma kind::mxf4nvf4
    B200, E8M0 scales of 32             tcgen05.mma kind::mxf4
    RTX 50, RTX PRO 6000 (sm_120)       mma.sync kind::mxf4nvf4 or kind::mxf4
    MI355X (gfx950), E8M0               v_mfma_scale_f32_*_f8f6f4
    MXFP8 on the same GPUs              kind::mxf8f6f4; v_mfma_scale_f32_*_f8f6f4
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a, rows of b and contraction (FP4; half of it in FP8) of a program's tile, its warps and stages.
TILE = (128, 128, 256, 8, 2)
_TYPES = {torch.uint8: "e2m1", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@triton.jit
def native_gemm_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, alpha_ptr, out_ptr, M, N, K,
    A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, PACK: tl.constexpr,
    E4M3: tl.constexpr, BLOCK: tl.constexpr, A_TALL: tl.constexpr, B_TALL: tl.constexpr,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = alpha * a @ b.T (+ out) of codes [M, K / PACK], [N, K / PACK]; alpha_ptr may be None.

    Scales uint8 [rows / TALL, K / BLOCK]: E4M3 or E8M0 bytes.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    code = tl.arange(0, BK // PACK)
    block = tl.arange(0, BK // BLOCK)
    a_row = a_ptr + m.to(tl.int64)[:, None] * (K // PACK)
    b_row = b_ptr + n.to(tl.int64)[None, :] * (K // PACK)
    a_scale_row = a_scales_ptr + (m // A_TALL).to(tl.int64)[:, None] * (K // BLOCK)
    b_scale_row = b_scales_ptr + (n // B_TALL).to(tl.int64)[:, None] * (K // BLOCK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        h = k // PACK + code
        s = k // BLOCK + block
        inside = h < K // PACK
        a = tl.load(a_row + h[None, :], mask=(m[:, None] < M) & inside[None, :], other=0)
        b = tl.load(b_row + h[:, None], mask=(n[None, :] < N) & inside[:, None], other=0)
        a_mask = (m[:, None] < M) & (s[None, :] < K // BLOCK)
        b_mask = (n[:, None] < N) & (s[None, :] < K // BLOCK)
        a_scales = tl.load(a_scale_row + s[None, :], mask=a_mask, other=0)
        b_scales = tl.load(b_scale_row + s[None, :], mask=b_mask, other=0)
        if E4M3:
            a_scales = a_scales.to(tl.float8e4nv, bitcast=True)
            b_scales = b_scales.to(tl.float8e4nv, bitcast=True)
        # Triton 3.7's interpreter hands A_TYPE over as a plain word, which its dot_scaled does not take.
        acc = tl.dot_scaled(
            a, a_scales, tl.constexpr(A_TYPE), b, b_scales, tl.constexpr(B_TYPE), acc
        )
    if alpha_ptr is not None:
        acc = acc * tl.load(alpha_ptr)
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ACCUMULATE:
        acc += tl.load(out, mask=inside, other=0.0)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def native_matmul(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    alpha: Tensor | None = None,
    accumulate: bool = False,
    tile: tuple[int, int, int, int, int] = TILE,
) -> Tensor:
    """``out = alpha * a @ b.T (+ out)``.

    Args:
        a: E2M1 codes uint8 [m, k / 2] or FP8 [m, k], and scales float8_e4m3fn [m or m / 16, k / 16] or
            float8_e8m0fnu [m or m / 32, k / 32], contiguous; b: the same of [n, k].
        out: [m, n] float32 or bfloat16, contiguous.
        alpha: fp32 scalar on the device; None for 1.
    """
    (codes_a, scales_a), (codes_b, scales_b) = a, b
    pack = 2 if codes_a.dtype == torch.uint8 else 1
    rows, cols, k = codes_a.shape[0], codes_b.shape[0], codes_a.shape[1] * pack
    bm, bn, bk, warps, stages = tile
    bk = bk * pack // 2  # the same bytes
    native_gemm_kernel[(triton.cdiv(rows, bm), triton.cdiv(cols, bn))](
        codes_a.view(torch.uint8), scales_a.view(torch.uint8),
        codes_b.view(torch.uint8), scales_b.view(torch.uint8), alpha, out, rows, cols, k,
        A_TYPE=_TYPES[codes_a.dtype], B_TYPE=_TYPES[codes_b.dtype], PACK=pack,
        E4M3=scales_a.dtype == torch.float8_e4m3fn, BLOCK=k // scales_a.shape[1],
        A_TALL=rows // scales_a.shape[0], B_TALL=cols // scales_b.shape[0], ACCUMULATE=accumulate,
        BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def instruction(device: torch.device, format_: str) -> str | None:
    """The block-scaled matrix instruction of a device for nvfp4, mxfp4 or mxfp8; None where it has none."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        return "v_mfma_scale_f32" if arch.startswith("gfx950") and format_ != "nvfp4" else None
    kind = {"nvfp4": "mxf4nvf4", "mxfp4": "mxf4", "mxfp8": "mxf8f6f4"}[format_]
    major = torch.cuda.get_device_capability(device)[0]
    return {10: f"tcgen05.mma kind::{kind}", 12: f"mma.sync kind::{kind}"}.get(major)
