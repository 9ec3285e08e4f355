"""Gradients of biases and of norms' weights: sums over tokens, which the kernel that has the terms writes."""

from __future__ import annotations

import torch
from fp4_kernels.spec import ColumnSums
from torch import Tensor

from fp4pretrain.nn.gemms import added_to_main_grad


class TokenSums:
    """Where a kernel writes the gradients of parameters [n], None where there is none.

    Attributes:
        out: fp32 [n] or None, one a parameter.
        add: whether they are main gradients, to which the kernel adds; otherwise they are tensors to write.
            All parameters need an FP32 main gradient for that.
    """

    def __init__(self, *parameters: Tensor | None) -> None:
        self._parameters = parameters
        there = [p for p in parameters if p is not None]
        mains = [getattr(p, "main_grad", None) for p in there]
        self.add = all(main is not None and main.dtype == torch.float32 for main in mains)
        self.out = [
            None
            if p is None
            else p.main_grad  # type: ignore[attr-defined]  # megatron-core's DDP sets it
            if self.add
            else torch.empty(p.shape, dtype=torch.float32, device=p.device)
            for p in parameters
        ]

    @property
    def first(self) -> ColumnSums | None:
        """The first parameter's place, None where there is no such parameter."""
        return None if self.out[0] is None else ColumnSums(self.out[0], self.add)

    def gradients(self) -> list[Tensor | None]:
        """What autograd is given, one a parameter, once the kernel has run."""
        return [
            None
            if p is None or out is None
            else added_to_main_grad(p)
            if self.add
            else out.to(p.dtype)
            for p, out in zip(self._parameters, self.out, strict=True)
        ]
