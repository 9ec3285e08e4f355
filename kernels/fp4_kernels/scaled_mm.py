"""The same GEMM through torch's ``scaled_mm``, which is cuBLASLt's block-scaled one on Blackwell.

Tensor cores want block scales in tiles of 128 rows by 4 blocks, each 512 adjacent bytes: row r and block c
of a tile lie at byte ``r % 32 * 16 + r // 32 * 4 + c`` (cuBLAS, "1D Block Scaling Factors Layout"), so that
one 16-byte read brings a thread its four blocks of four rows. Tiles follow each other along the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS, _BLOCKS = 128, 4


def swizzle(scales: Tensor) -> Tensor:
    """Block scales [rows, blocks] of one byte each as tensor cores read them, a flat tensor.

    Rows are padded to multiples of 128 and blocks to multiples of 4, with zeros.
    """
    rows, blocks = scales.shape
    tall, wide = -(-rows // _ROWS), -(-blocks // _BLOCKS)
    s = scales.view(torch.uint8)
    if (tall * _ROWS, wide * _BLOCKS) != (rows, blocks):
        s = F.pad(s, (0, wide * _BLOCKS - blocks, 0, tall * _ROWS - rows))
    tiles = s.view(tall, 4, 32, wide, _BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def unswizzle(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """The block scales [rows, blocks] that ``swizzle`` made ``flat`` of."""
    rows, blocks = shape
    tall, wide = -(-rows // _ROWS), -(-blocks // _BLOCKS)
    tiles = flat.view(torch.uint8).view(tall, wide, 32, 4, _BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall * _ROWS, wide * _BLOCKS)[:rows, :blocks].view(flat.dtype)


def why_missing(format_: str) -> str | None:
    """None where this torch has a ``scaled_mm`` for the format, otherwise the reason in one clause."""
    if torch.version.hip is not None:
        return "torch's scaled_mm wants other layouts on ROCm"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm"
    if format_ != "mxfp8" and not hasattr(torch, "float4_e2m1fn_x2"):
        return f"torch {torch.__version__} has no FP4"
    return None


def scaled_matmul(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    *,
    out_dtype: torch.dtype,
    alphas: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``alphas[0] * alphas[1] * a @ b.T`` as bfloat16 or float32.

    Args:
        a: packed E2M1 codes uint8 [m, k / 2] or FP8 [m, k], and their swizzled scales: float8_e4m3fn of
            16 elements, or float8_e8m0fnu of 32; b: the same of [n, k].
        alphas: fp32 scalars of both operands on the device (E4M3 scales: needed).

    Raises:
        RuntimeError, ValueError, NotImplementedError: torch's own, where it has no such GEMM.
    """
    kind, swizzling = F.ScalingType, F.SwizzleType  # type: ignore[attr-defined]
    nvfp4 = a[1].dtype == torch.float8_e4m3fn
    recipe: list[Any] = [kind.BlockWise1x16 if nvfp4 else kind.BlockWise1x32]
    swizzles: list[Any] = [swizzling.SWIZZLE_32_4_4]
    scales = [[a[1]], [b[1]]]
    if alphas is not None:
        recipe.append(kind.TensorWise)
        swizzles.append(swizzling.NO_SWIZZLE)
        scales = [[a[1], alphas[0]], [b[1], alphas[1]]]
    left, right = (
        codes.view(torch.float4_e2m1fn_x2) if codes.dtype == torch.uint8 else codes
        for codes in (a[0], b[0])
    )
    return F.scaled_mm(
        left, right.t(), scales[0], recipe, scales[1], recipe, swizzles, swizzles,
        output_dtype=out_dtype,
    )  # fmt: skip
