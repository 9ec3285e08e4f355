"""Launching the quantization kernel: allocate what is asked for, pick a tile, go.

Host time counts: a training step launches this a few times a linear, so there is no tuning at run time
and no tensor is touched on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4_kernels.device import has_fast_casts
from fp4_kernels.launch import Argument, launch
from fp4_kernels.quantize_kernel import quantize_kernel
from fp4_kernels.spec import FORMATS, Copy

# Tokens / 16 and columns of a program's tile, and its warps: for a row copy alone or two copies of exact
# values, for two others, and for what reaches over 64 columns or tokens. The best of five (of two copies: of
# sixteen) measured on an H100.
ROW_TILE = (2, 128, 4)
TILE = (4, 64, 4)
LARGE_TILE = (8, 128, 4)

_SCALE_DTYPE = {"nvfp4": torch.float8_e4m3fn, "mx": torch.float8_e8m0fnu, "fp8": torch.float32}


@dataclass
class Quantized:
    """One copy as it lies in memory.

    Attributes:
        out: codes: uint8 [rows, cols / 2] (the even element in the low nibble) or FP8 [rows, cols];
            exact: bfloat16 [rows, cols]; e4m3: float8_e4m3fn [rows, cols].
        scales: codes: one a block, [row blocks, col blocks]; e4m3: the rows' factors, fp32 [rows];
            None for exact values.
        alpha: fp32 scalar that remains for a GEMM's result, or None for 1.
        shape: (rows, cols) of the copy.
        paired: fp32 scalar, ``alpha`` times the partner's, where one was given and there is an alpha.
    """

    out: Tensor
    scales: Tensor | None
    alpha: Tensor | None
    shape: tuple[int, int]
    paired: Tensor | None = None


def quantize(
    x: Tensor,
    *,
    row: Copy | None = None,
    col: Copy | None = None,
    row_amax: Tensor | None = None,
    col_amax: Tensor | None = None,
    lost: Tensor | None = None,
    partners: tuple[Tensor | None, Tensor | None] = (None, None),
    tile: tuple[int, int, int] | None = None,
) -> tuple[Quantized | None, Quantized | None]:
    """A copy of ``x`` [R, C] with blocks along its columns, one of ``x.T``, or both from one read.

    Args:
        x: bfloat16, float16 or float32; one of its strides is 1.
        row: the copy of x; None to leave it out.
        col: the copy of x.T; None to leave it out.
        row_amax: the row copy's amax, fp32, after its rotation: a scalar where ``Copy.amax`` is
            "tensor", one a row of the copy where it is "row".
        col_amax: the column copy's, likewise.
        lost: int64 [2], to which the counts of elements that an e4m3 copy could not hold are added.
        partners: alphas (fp32 scalars) of the operands that the row copy and the column copy will be
            multiplied with; their products with the copies' own are made on the way.
        tile: tokens / 16, columns, warps of a program; None for the one that was measured best.

    Returns:
        (row copy, column copy), None where not asked for.

    Raises:
        ValueError: where blocks or rotation do not divide x, or an amax is missing.
    """
    if x.dim() != 2 or (x.stride(1) != 1 and x.stride(0) != 1):
        raise ValueError(f"quantize takes a matrix with a unit stride, got strides {x.stride()}")
    if x.stride(1) != 1 and x.shape[1] > 1:
        c, r = quantize(
            x.t(), row=col, col=row, row_amax=col_amax, col_amax=row_amax, lost=lost,
            partners=partners[::-1], tile=tile,
        )  # fmt: skip
        return r, c
    rows, cols = x.shape
    made_row = _allocate(x, row, (rows, cols), row_amax, partners[0])
    made_col = _allocate(x, col, (cols, rows), col_amax, partners[1])
    tb, bn, warps = tile or _tile(row, col)
    even = rows % (tb * 16) == 0 and cols % bn == 0
    fast = has_fast_casts(x.device)
    grid = (-(-cols // bn), -(-rows // (tb * 16)))
    launch(
        quantize_kernel,
        grid,
        (
            x, x.stride(0), rows, cols,
            *_pointers(row, made_row, row_amax, partners[0], lost, 0),
            *_pointers(col, made_col, col_amax, partners[1], lost, 1),
        ),
        (
            *(row.launch_scalars() if row else _NO_SCALARS),
            *(col.launch_scalars() if col else _NO_SCALARS),
        ),
        (row.config() if row else None, col.config() if col else None, tb, bn, even, fast),
        warps=warps,
    )  # fmt: skip
    return made_row, made_col


def _tile(row: Copy | None, col: Copy | None) -> tuple[int, int, int]:
    copies = [copy for copy in (row, col) if copy is not None]
    if any(max(copy.rotation, copy.block_length) > 64 for copy in copies):
        return LARGE_TILE
    exact = row is not None and col is not None and row.output == col.output == "exact"
    return ROW_TILE if col is None or exact else TILE


_NO_SCALARS = (0, 0, 0, 0, 1, 0, 0, 1, 0)


def _pointers(
    copy: Copy | None,
    made: Quantized | None,
    amax: Tensor | None,
    partner: Tensor | None,
    lost: Tensor | None,
    side: int,
) -> tuple:
    """(output, scales, amax, alpha, partner, lost, draw): outputs are stored as words, scales as bytes."""
    if copy is None or made is None:
        return None, None, None, None, None, None, None
    scales: Argument = made.scales
    if made.scales is not None and made.scales.dtype != torch.float32:
        scales = made.scales, torch.uint8
    counted = copy.output == "e4m3" and lost is not None
    return (
        (made.out, torch.int32), scales, amax, made.alpha, None if made.paired is None else partner,
        lost[side:] if counted else None, copy.draw,
    )  # fmt: skip


def _allocate(
    x: Tensor,
    copy: Copy | None,
    shape: tuple[int, int],
    amax: Tensor | None,
    partner: Tensor | None = None,
) -> Quantized | None:
    if copy is None:
        return None
    rows, cols = shape
    kind, element, _ = FORMATS[copy.format]
    length = copy.block_length
    if cols % max(length, copy.rotation, 16) or (copy.block == "2d" and rows % length):
        raise ValueError(f"blocks or rotation of {copy} do not divide [{rows}, {cols}]")
    if copy.amax != "none" and amax is None:
        raise ValueError(f"{copy.format} {copy.block} {copy.output} needs an amax ({copy.amax})")
    scales = None
    if copy.output == "exact":
        out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    elif copy.output == "e4m3":
        out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    else:
        width = cols // 2 if element.dtype == torch.uint8 else cols
        out = torch.empty((rows, width), dtype=element.dtype, device=x.device)
        if copy.amax == "row":
            scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
        elif length:
            blocks = (rows // length if copy.block == "2d" else rows, cols // length)
            scales = torch.empty(blocks, dtype=_SCALE_DTYPE[kind], device=x.device)
    alpha = paired = None
    if copy.amax == "tensor" and partner is None:
        alpha = torch.empty((), dtype=torch.float32, device=x.device)
    elif copy.amax == "tensor":
        alpha, paired = torch.empty(2, dtype=torch.float32, device=x.device).unbind()
    return Quantized(out, scales, alpha, shape, paired)
