"""What the Transformer Engine backend multiplies: operands as its quantizers make and its GEMM takes them.

    kind       data                          scale                                  amax
    bf16       the tensor itself             -                                      -
    tensor     FP8 codes                     fp32 [1], of dequantization            -
    blocks     FP8 codes                     fp32, 1d: [k / 128, rows up to 4]      -
                                             2d: [rows / 128, k / 128 up to 4]
    mxfp8      FP8 codes                     E8M0 codes of 32 along k               -
    nvfp4      two E2M1 codes a byte         E4M3 codes of 16 along k               fp32 [1]

Its scales are padded to what its kernels read; ``dequantize`` leaves the padding out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4pretrain.numerics import FORMATS
from fp4pretrain.numerics.rounding import decode
from fp4pretrain.ops.operand import Operand, dequantized

# NVFP4's amax stands for the largest E2M1 element under the largest E4M3 scale.
_NVFP4_OUTER = 6.0 * 448.0


@dataclass
class EngineOperand(Operand):
    """One side of a GEMM [rows, k], with zeros behind its rows and along k up to whole units.

    ``kind``, ``data``, ``scale``, ``amax``: the table above. ``format``: a name of ``FORMATS``. ``columns``:
    data lies [k, rows], and scales with it. ``tiles``: blocks of 128x128.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("data", "scale", "amax")
    kind: str
    format: str
    data: Tensor
    shape: tuple[int, int]
    columns: bool = False
    tiles: bool = False
    scale: Tensor | None = None
    amax: Tensor | None = None

    @property
    def lying(self) -> tuple[int, int]:
        """Rows and k as they lie, with all zeros that pad them; two codes of a byte count twice."""
        rows, length = self.data.shape
        if self.kind == "nvfp4":
            length *= 2
        return (length, rows) if self.columns else (rows, length)

    def dequantize(self) -> Tensor:
        """fp32 [rows, k]; see ``Operand.dequantize``."""
        values = self.data if self.scale is None else self._values() * self._factors()
        outer = None
        if self.amax is not None:  # by a tensor: torch multiplies by the reciprocal of a number
            outer = self.amax.reshape(()) / torch.tensor(_NVFP4_OUTER, device=self.data.device)
        turned = values.t() if self.columns else values
        return dequantized(turned[: self.shape[0]], outer)

    def _values(self) -> Tensor:
        """fp32 elements as they lie."""
        element = FORMATS[self.format].element
        codes = self.data if element.packed else self.data.view(element.dtype)
        return decode(codes, element)

    def _factors(self) -> Tensor:
        """fp32 scales, spread over the elements as they lie; NVFP4's without its outer one."""
        assert self.scale is not None
        rows, length = self.lying[::-1] if self.columns else self.lying
        if self.kind == "tensor":
            return self.scale.reshape(())
        if self.kind == "blocks":
            if not self.tiles:
                return self.scale[:, :rows].t().repeat_interleave(128, 1)
            spread = self.scale[:, : length // 128].repeat_interleave(128, 0)
            return spread.repeat_interleave(128, 1)
        if self.kind == "mxfp8":
            scales = self.scale.view(torch.float8_e8m0fnu).to(torch.float32)
            if self.columns:
                return scales[: rows // 32, :length].repeat_interleave(32, 0)
            return scales[:rows, : length // 32].repeat_interleave(32, 1)
        scales = self.scale.view(torch.float8_e4m3fn).to(torch.float32)
        return scales[:rows, : length // 16].repeat_interleave(16, 1)

    def transposed(self) -> Operand | None:
        """BF16 without padding: its GEMM reads a BF16 matrix either way."""
        if self.kind != "bf16" or self.lying != self.shape:
            return None
        turned = (self.shape[1], self.shape[0])
        return EngineOperand("bf16", self.format, self.data, turned, not self.columns)

    def stored(self) -> Any:
        """The operand as Transformer Engine's own class for it (BF16: the tensor), for its GEMM."""
        if self.kind == "bf16":
            return self.data
        from transformer_engine.pytorch.tensor import storage

        kind = code_type(self.format)
        if self.kind == "tensor":
            return storage.Float8TensorStorage(
                data=self.data, fp8_scale_inv=self.scale, fp8_dtype=kind, fake_dtype=torch.bfloat16
            )
        empty = (None, None)
        sides = (self.data, self.scale)
        if self.kind == "blocks":
            return storage.Float8BlockwiseQTensorStorage(
                *sides, *empty, kind, None, self.tiles, fake_dtype=torch.bfloat16
            )
        if self.kind == "mxfp8":
            both = (*empty, *sides) if self.columns else (*sides, *empty)
            return storage.MXFP8TensorStorage(*both, kind, None, False, fake_dtype=torch.bfloat16)
        return storage.NVFP4TensorStorage(
            *sides, *empty, self.amax, None, kind, None, False, fake_dtype=torch.bfloat16
        )


def code_type(format_: str) -> Any:
    """Transformer Engine's name of a format's elements."""
    import transformer_engine_torch as tex

    names = {"e4m3": "kFloat8E4M3", "e5m2": "kFloat8E5M2", "e2m1": "kFloat4E2M1"}
    return getattr(tex.DType, names[FORMATS[format_].element.name])
