"""Blocks of a matrix as a view, the largest magnitude of each, and slices that fit a CPU's cache.

Blocks lie along the columns, the contraction axis of every GEMM here. A tile of the 2d kind is as
tall as it is wide, so a weight and its transpose share tiles and therefore codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elementwise passes on a CPU run over slices that stay in a core's second-level cache: a step is
# ten passes, and from main memory each costs three times as much. Smaller slices drown in call
# overhead.
_CPU_SLICE_ELEMENTS = 1 << 16
_CPU_TILE_ROWS = 128


def block_view(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, cols] as [rows / block rows, block rows, cols / block cols, block cols], a view."""
    rows, cols = x.shape
    return x.view(rows // block[0], block[0], cols // block[1], block[1])


def spread(scales: Tensor) -> Tensor:
    """[row blocks, col blocks] so that it broadcasts over a ``block_view``."""
    return scales[:, None, :, None]


def row_slices(shape: tuple[int, int], block_rows: int, device: torch.device) -> Iterator[slice]:
    """Row ranges, whole blocks tall: cache-sized on a CPU, everything at once elsewhere."""
    rows, cols = shape
    step = rows
    if device.type == "cpu":
        step = max(_CPU_SLICE_ELEMENTS // (cols * block_rows), 1) * block_rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def tiles(
    shape: tuple[int, int], *, multiple: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """(rows, cols) ranges whose widths are multiples of ``multiple``, cache-sized on a CPU.

    Tiles, not rows, because both sides of a transposing copy should lie in the cache.
    """
    rows, cols = shape
    if device.type != "cpu":
        yield slice(0, rows), slice(0, cols)
        return
    width = max(_CPU_SLICE_ELEMENTS // (_CPU_TILE_ROWS * multiple), 1) * multiple
    for row in range(0, rows, _CPU_TILE_ROWS):
        for col in range(0, cols, width):
            yield slice(row, min(row + _CPU_TILE_ROWS, rows)), slice(col, min(col + width, cols))


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block, fp32 [row blocks, col blocks]; NaN where one is in it.

    Compared as integers, the bits of magnitudes are ordered as the floats are, NaN over Inf over
    any finite number, and PyTorch reduces integers twice as fast.
    """
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    magnitude = torch.tensor(torch.iinfo(integer).max, dtype=integer, device=x.device)
    x_b = block_view(x.view(integer), block)
    parts, scratch = [], None
    for rows in row_slices((x.shape[0], x.shape[1]), block[0], x.device):
        bits = x_b[rows.start // block[0] : rows.stop // block[0]]
        if scratch is None or scratch.shape != bits.shape:
            scratch = torch.empty_like(bits)
        torch.bitwise_and(bits, magnitude, out=scratch)
        rows_max = scratch.squeeze(1) if block[0] == 1 else scratch.amax(dim=1)
        parts.append(rows_max.amax(dim=-1))
    return torch.cat(parts).view(x.dtype).to(torch.float32)


def outer_amax(amax_b: Tensor, outer: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Amaxes of outer blocks from those of the blocks in them, [row blocks, col blocks]."""
    tall, wide = max(outer[0] // block[0], 1), max(outer[1] // block[1], 1)
    return block_view(amax_b, (tall, wide)).amax(dim=(1, 3))


def over_blocks(factors: Tensor, outer: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Factors of outer blocks repeated for every block in them; a scalar stays one."""
    if factors.dim() == 0:
        return factors
    tall, wide = max(outer[0] // block[0], 1), max(outer[1] // block[1], 1)
    return factors.repeat_interleave(tall, 0).repeat_interleave(wide, 1)


def tensor_amax(x: Tensor) -> Tensor:
    """The largest magnitude of a tensor, an fp32 scalar; NaN over Inf over any number; 0 of nothing."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high.abs()).to(torch.float32)
