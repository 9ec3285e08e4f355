"""Blocks of a matrix as a view, and the largest magnitude of each.

Blocks lie along the columns, the contraction axis of every GEMM here. A tile of the 2d kind is as tall
as it is wide, so a weight and its transpose share tiles and therefore codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elementwise passes on a CPU run over slices that stay in a core's second-level cache.
_CPU_SLICE_ELEMENTS = 1 << 15


def block_view(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, cols] as [rows / block rows, block rows, cols / block cols, block cols], a view."""
    return x.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def spread(scales: Tensor) -> Tensor:
    """[row blocks, col blocks] so that it broadcasts over a ``block_view``."""
    return scales[:, None, :, None]


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block, fp32 [row blocks, col blocks]; NaN where one is in it."""
    return block_view(x.abs(), block).amax(dim=(1, 3)).to(torch.float32)


def tensor_amax(x: Tensor) -> Tensor:
    """The largest magnitude of a tensor, an fp32 scalar; NaN over Inf over any finite number."""
    low, high = torch.aminmax(x)
    return torch.maximum(low.abs(), high.abs()).to(torch.float32)


def row_slices(shape: tuple[int, int], block_rows: int, device: torch.device) -> Iterator[slice]:
    """Row ranges, whole blocks tall: cache-sized on a CPU, everything at once elsewhere."""
    rows, cols = shape
    step = rows
    if device.type == "cpu":
        step = max(_CPU_SLICE_ELEMENTS // (cols * block_rows), 1) * block_rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
