"""``tl.dot_scaled`` for an interpreter that lacks it: that of Triton 3.7.1, which torch 2.13 requires."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def provide() -> None:
    """Give the interpreter the operation where it has none of its own."""
    if not hasattr(InterpreterBuilder, "create_dot_scaled"):
        InterpreterBuilder.create_dot_scaled = _create_dot_scaled


def _create_dot_scaled(
    builder: Any, a: Any, a_scale: Any, a_format: Any, b: Any, b_scale: Any, b_format: Any,
    fast_math: bool, a_packed: bool, b_packed: bool, acc: Any,
) -> Any:  # fmt: skip
    """acc [M, N] + a [M, K] @ b [K, N]; E8M0 scales [M, K / block] and [N, K / block]; packed along K."""
    left = _values(a, a_scale)
    right = _values(TensorHandle(b.data.T, b.dtype), b_scale)
    return TensorHandle(np.matmul(left, right.T, dtype=np.float32) + acc.data, acc.dtype.scalar)


def _values(codes: Any, scale: Any) -> np.ndarray:
    """float32 [rows, K] of codes [rows, K or K / 2] and their scales."""
    raw = np.ascontiguousarray(codes.data).view(np.uint8)
    if codes.dtype.scalar in FP8:
        values = torch.from_numpy(raw).view(FP8[codes.dtype.scalar]).float().numpy()
    else:
        values = E2M1[np.stack([raw & 15, raw >> 4], axis=-1)].reshape(len(raw), -1)
    scales = np.ascontiguousarray(scale.data).view(np.uint8)
    factors = torch.from_numpy(scales).view(torch.float8_e8m0fnu).float().numpy()
    return values * np.repeat(factors, values.shape[1] // factors.shape[1], axis=1)
