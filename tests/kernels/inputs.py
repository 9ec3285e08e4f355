"""Inputs that casts are tried on."""

from __future__ import annotations

import torch

# What is unusual in an input. Those but plain also check exact values and unpacking.
INPUTS = ("plain", "huge", "tiny", "zero", "nan", "inf")


def sample(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """bfloat16 numbers with outliers, zeros and -0.0, and whatever ``kind`` says.

    Subnormals come as fp32: the interpreter misreads those of bfloat16 (the GPU tests have them).
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp(2 * torch.randn(shape[0], 1, generator=g))
    x[:, ::37] *= 50
    x[16:32, :64] = 0
    x[3, 5] = -0.0
    x *= {"huge": 1e30, "tiny": 1e-36, "zero": 0.0}.get(kind, 1.0)
    if kind in ("nan", "inf"):
        x[5, 7] = float(kind)
    if kind == "tiny":
        x[8, :32] *= 1e-3
    return x.bfloat16().float() if kind == "tiny" else x.bfloat16()
