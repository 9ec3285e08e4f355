"""The reference GEMM: what every backend's product of two quantized operands must be close to.

``out[m, n] = alpha_a * alpha_b * sum_k values_a[m, k] * values_b[n, k]``: both operands have their
contraction axis last, and fp32 scales of a whole tensor or row go on the result, never on an operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4pretrain.numerics.quantize import QuantizedTensor


def gemm_reference(
    a: QuantizedTensor,
    b: QuantizedTensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """``a @ b.T``, [m, n] in ``out_dtype``, from a [m, k] and b [n, k].

    Args:
        accumulate: torch.float32 as hardware does, or torch.float64 for an error bound.

    Raises:
        ValueError: where the contraction dimensions differ.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"contraction dimensions differ: {a.shape} against {b.shape}")
    product = a.values().to(accumulate) @ b.values().to(accumulate).T
    alpha_b = b.alpha()
    alpha = a.alpha() * (alpha_b if alpha_b.dim() == 0 else alpha_b.t())
    return (product * alpha).to(out_dtype)
