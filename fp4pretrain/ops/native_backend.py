"""The native backend: packed FP4 operands, multiplied as such by tensor cores that can.

Casts are the Triton backend's, as packed codes and block scales; a GEMM of two of them is one
``tl.dot_scaled`` kernel. GEMMs in BF16 and FP8 (what a recipe keeps) go the Triton backend's way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from fp4_kernels.native import instruction, native_matmul
from fp4_kernels.spec import Copy
from torch import Tensor

from fp4pretrain.ops.backend import Cast
from fp4pretrain.ops.triton_backend import TritonBackend, TritonOperand, operand_specs
from fp4pretrain.precision import Gemm

_FP4 = ("nvfp4", "mxfp4")


class NativeBackend(TritonBackend):
    """Blackwell and MI355X."""

    name = "native"

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""
        if device.type != "cuda":
            return f"FP4 tensor cores are on GPUs, not on {device.type}"
        specs = operand_specs(gemm)
        quantized = [s for s in specs if s.format in _FP4]
        if not quantized:
            return super().why_not(gemm, device)
        if any(s.format != quantized[0].format for s in specs):
            return f"{specs[0].format} and {specs[1].format} do not meet in one FP4 instruction"
        if instruction(device, quantized[0].format) is None:
            return (
                f"{torch.cuda.get_device_name(device)} has no matrix instruction for "
                f"{quantized[0].format} (B200, RTX 50; mxfp4 also MI355X)"
            )
        return None

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """The FP4 matrix instruction, or what multiplies a GEMM that is not in FP4."""
        format_ = operand_specs(gemm)[0].format
        found = instruction(device, format_) if format_ in _FP4 else None
        return found or super().instruction(gemm, device)

    def _copy(self, cast: Cast, device: torch.device) -> Copy:
        copy = super()._copy(cast, device)
        return replace(copy, output="codes") if cast.spec.format in _FP4 else copy

    def gemm(
        self,
        a: TritonOperand,
        b: TritonOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
    ) -> Tensor:
        """a @ b.T; see ``Backend.gemm``."""
        if a.scales is None or b.scales is None:
            return super().gemm(a, b, out_dtype=out_dtype, accumulate_into=accumulate_into)
        alpha = a.alpha if b.alpha is None else b.alpha if a.alpha is None else a.alpha * b.alpha
        out = accumulate_into
        fits = out is not None and out.dtype == torch.float32 and out.is_contiguous()
        if out is None or not fits:
            dtype = out_dtype if out is None else torch.float32
            target = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=a.data.device)
        else:
            target = out
        native_matmul(
            (a.data, a.scales), (b.data, b.scales), target, alpha=alpha, accumulate=target is out
        )
        return target if out is None or target is out else out.add_(target)
