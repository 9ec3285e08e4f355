"""Small products with known results, multiplied on the device before a run trusts it with large ones.

What cannot be tested where this project is tested (another GPU's instructions, a library's scale layouts)
is tested where it is about to be used: once a process, in milliseconds.
"""

from __future__ import annotations

from functools import cache

import torch
from fp4_kernels import cublaslt
from torch import Tensor


@cache
def blocks_by_cublaslt(device: torch.device) -> bool:
    """Whether cuBLASLt multiplies FP8 in blocks of 128 here, and as the recipe means it.

    Its scale modes are Hopper's, from CUDA 12.9 on. Both pairs that recipes have are tried: vectors
    by tiles (x by w), vectors by vectors (dy by x) added to what is there.
    """
    if device.type != "cuda" or torch.version.hip or cublaslt.why_missing():
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    g = torch.Generator().manual_seed(1)
    rows, k = 256, 384
    a, b = (torch.randint(-8, 9, (rows, k), generator=g).float() for _ in "ab")
    vectors = torch.exp2(torch.randint(-4, 5, (rows, k // 128), generator=g).float())
    tiles = torch.exp2(torch.randint(-4, 5, (rows // 128, k // 128), generator=g).float())
    for factors, tall in ((tiles, 128), (vectors.flip(0), 1)):
        want = _scaled(a, vectors, 1) @ _scaled(b, factors, tall).t() + 1
        out = torch.ones(rows, rows, device=device)
        try:
            cublaslt.matmul(
                a.to(device, torch.float8_e4m3fn),
                b.to(device, torch.float8_e4m3fn),
                out,
                accumulate=True,
                scales=(
                    cublaslt.block_layout(vectors.to(device), tiles=False),
                    cublaslt.block_layout(factors.to(device), tiles=tall > 1),
                ),
            )
        except cublaslt.CublasError:
            return False
        # integers below 2^13 a block: exact in any accumulator, so only a wrong scale differs
        if not torch.allclose(out.cpu().double(), want, rtol=1e-4, atol=1e-2):
            return False
    return True


def _scaled(x: Tensor, factors: Tensor, tall: int) -> Tensor:
    """float64 x [rows, k] times the factors of its blocks."""
    return (x * factors.repeat_interleave(tall, 0).repeat_interleave(128, 1)).double()
