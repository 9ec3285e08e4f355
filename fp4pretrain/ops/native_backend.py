"""The native backend: packed operands and their block scales, multiplied as such by tensor cores that can.

Casts are the Triton backend's, as codes and block scales. A GEMM of two of them is torch's ``scaled_mm``
(cuBLASLt) where that passes a self-check on the device, otherwise one ``tl.dot_scaled`` kernel, which adds
main gradients in its epilogue; where neither passes, the backend refuses and says why. GEMMs in BF16 and in
FP8 with FP32 scales (what a recipe keeps) go the Triton backend's way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from fp4_kernels.native import instruction, native_matmul
from fp4_kernels.scaled_mm import scaled_matmul, swizzle
from fp4_kernels.spec import Copy
from torch import Tensor

from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.selfcheck import native_path
from fp4pretrain.ops.triton_backend import TritonBackend
from fp4pretrain.ops.triton_operand import TritonOperand, finished, product, target_of
from fp4pretrain.precision import Gemm

_NATIVE = ("nvfp4", "mxfp4", "mxfp8")


class NativeBackend(TritonBackend):
    """Blackwell and MI355X."""

    name = "native"
    multiplies_codes = True

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""
        if device.type != "cuda":
            return f"FP4 tensor cores are on GPUs, not on {device.type}"
        specs = gemm.specs
        quantized = [s for s in specs if s.format in _NATIVE]
        if not quantized:
            return super().why_not(gemm, device)
        format_ = quantized[0].format
        if any(s.format != format_ for s in specs):
            return f"{specs[0].format} and {specs[1].format} do not meet in one instruction"
        if instruction(device, format_) is None:
            return (
                f"{torch.cuda.get_device_name(device)} has no matrix instruction for {format_} "
                "(B200, RTX 50; mxfp4 and mxfp8 also MI355X)"
            )
        path, reasons = native_path(format_, device)
        return reasons if path is None else None

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """The block-scaled instruction and who issues it, or what multiplies another GEMM."""
        format_ = gemm.specs[0].format
        found = instruction(device, format_) if format_ in _NATIVE else None
        if found is None:
            return super().instruction(gemm, device)
        path, reasons = native_path(format_, device)
        by = {"scaled_mm": "torch scaled_mm", "dot_scaled": "Triton"}.get(path or "", "")
        return f"{found} ({by}{'; not ' + reasons if reasons else ''})"

    def _copy(self, cast: Cast, device: torch.device) -> Copy:
        copy = super()._copy(cast, device)
        return replace(copy, output="codes") if cast.spec.format in _NATIVE else copy

    def gemm(
        self,
        a: TritonOperand,
        b: TritonOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
        fast_accum: bool = False,
    ) -> Tensor:
        """a @ b.T; see ``Backend.gemm``. FP4 tensor cores have one way of adding."""
        if a.scales is None or b.scales is None:
            return super().gemm(
                a, b, out_dtype=out_dtype, accumulate_into=accumulate_into, fast_accum=fast_accum
            )
        alpha = product(a, b)
        if native_path(_format(a), a.data.device)[0] == "scaled_mm":
            return _by_scaled_mm(a, b, alpha, out_dtype=out_dtype, out=accumulate_into)
        target = target_of(a, b, out_dtype, accumulate_into)
        if not target.is_contiguous():
            target = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        native_matmul(
            (a.data, a.scales),
            (b.data, b.scales),
            target,
            alpha=alpha,
            accumulate=target is accumulate_into,
        )
        return finished(target, out_dtype, accumulate_into)


def _format(operand: TritonOperand) -> str:
    assert operand.scales is not None
    if operand.scales.dtype == torch.float8_e4m3fn:
        return "nvfp4"
    return "mxfp4" if operand.data.dtype == torch.uint8 else "mxfp8"


def _by_scaled_mm(
    a: TritonOperand,
    b: TritonOperand,
    alpha: Tensor | None,
    *,
    out_dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """a @ b.T by torch, whose result is added to ``out`` in a pass of its own."""
    nvfp4 = _format(a) == "nvfp4"
    dtype = out_dtype if out is None and (nvfp4 or alpha is None) else torch.float32
    result = scaled_matmul(
        (a.data, _swizzled(a)),
        (b.data, _swizzled(b)),
        out_dtype=dtype,
        alphas=(a.alpha, b.alpha)
        if nvfp4 and a.alpha is not None and b.alpha is not None
        else None,
    )
    if alpha is not None and not nvfp4:  # the unbiased rule's 4/3 of an MX operand
        result *= alpha
    return result.to(out_dtype) if out is None else out.add_(result)


def _swizzled(operand: TritonOperand) -> Tensor:
    """The operand's block scales, one a row, as tensor cores read them; kept with it."""
    if operand.swizzled is None:
        assert operand.scales is not None
        scales = operand.scales
        tall = operand.shape[0] // scales.shape[0]
        if tall > 1:
            scales = scales.view(torch.uint8).repeat_interleave(tall, 0).view(scales.dtype)
        operand.swizzled = swizzle(scales)
    return operand.swizzled
