"""The Triton backend: fused casts, and GEMMs on the tensor cores that every NVIDIA GPU since Ampere has.

What an operand becomes, by its format (FP8 tensor cores: Ada, Hopper and later):

    format            operand                                         GEMM
    bf16              the tensor itself, or a view of it              cuBLAS
    nvfp4, mxfp8      element x block scale, exact in BF16            cuBLASLt, tensor scales as alpha
    mxfp4             E4M3 under one power of two a row               cuBLASLt FP8, row factors
    mxfp4, no FP8     element x block scale, exact in BF16            cuBLASLt
    fp8 tensor, row   FP8 codes                                       cuBLASLt FP8, alpha or row factors

A row-wise and a column-wise copy come from one read of the tensor, and their amaxes from another. An
operand that is kept for the backward pass is packed where that is smaller (nvfp4) and expanded when its
GEMM comes. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from fp4_kernels import cublaslt
from fp4_kernels.amax import amax as tensor_amaxes
from fp4_kernels.amax import line_amax
from fp4_kernels.quantize import Quantized, quantize
from fp4_kernels.spec import Copy, Noise
from fp4_kernels.unpack import unpack
from torch import Tensor

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops.backend import Cast, ReduceAmax
from fp4pretrain.precision import OPERANDS, Gemm

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class TritonOperand:
    """One side of a GEMM [rows, k].

    ``data``: BF16 or FP8 values, or (``scales`` given) packed codes. The product is multiplied by
    ``alpha`` (fp32 scalar, None for 1) and its rows by ``factors`` (fp32 [rows], None for 1).
    """

    data: Tensor
    shape: tuple[int, int]
    alpha: Tensor | None = None
    factors: Tensor | None = None
    scales: Tensor | None = None

    def values(self) -> Tensor:
        """BF16 or FP8 [rows, k]."""
        return self.data if self.scales is None else unpack(self.data, self.scales)


class TritonBackend:
    """Triton casts and cuBLASLt GEMMs. ``exact_mxfp4``: carry MXFP4 in BF16 also where E4M3 would do.

    E4M3 holds MXFP4 blocks down to 2^14 under the largest of their row exactly; ``lost`` counts the
    elements that were rounded (row copies, column copies), as long as the process lives.
    """

    name = "triton"

    def __init__(self, *, exact_mxfp4: bool = False) -> None:
        self._exact_mxfp4 = exact_mxfp4
        self._lost: dict[torch.device, Tensor] = {}

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""
        if device.type != "cuda":
            return f"its kernels run on CUDA devices, not on {device.type}"
        if torch.version.hip is not None:
            return "it multiplies by cuBLASLt, which ROCm does not have"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs BF16 tensor cores (Ampere or later)"
        missing = cublaslt.why_missing()
        if missing:
            return missing
        return self._why_not_specs(operand_specs(gemm), gemm, device)

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """The matrix instruction that cuBLASLt has for the operands on the device."""
        major = torch.cuda.get_device_capability(device)[0]
        family = {9: "wgmma", 10: "tcgen05.mma"}.get(major, "mma.sync")
        fp8 = all(self._in_fp8(spec, device) for spec in operand_specs(gemm))
        return f"{family} {'e4m3/e5m2' if fp8 else 'bf16'} (cuBLASLt)"

    def _why_not_specs(
        self, specs: list[QuantSpec], gemm: Gemm, device: torch.device
    ) -> str | None:
        if any(s.row.family == "fp8" and s.block in ("1d", "2d") for s in specs):
            return "it has no GEMM for FP8 scaled in blocks of 128"
        if gemm.rotation.active and not all(s.quantized for s in specs):
            return "it rotates only while casting below BF16"
        fp8 = [self._in_fp8(s, device) for s in specs]
        if any(fp8) and not all(fp8):
            return f"{specs[0].format} and {specs[1].format} do not meet in one tensor-core format"
        if all(s.format == "fp8_e5m2" for s in specs):
            return "tensor cores multiply E5M2 with E4M3 only in cuBLASLt"
        if any(s.row.family == "fp8" for s in specs) and not _has_fp8(device):
            return "it needs FP8 tensor cores (Ada or later)"
        by_rows = any(s.block == "row" or s.format == "mxfp4" for s in specs) and all(fp8)
        if by_rows and torch.cuda.get_device_capability(device)[0] != 9:
            return "cuBLASLt scales FP8 by rows on Hopper only"
        return None

    def _in_fp8(self, spec: QuantSpec, device: torch.device) -> bool:
        """Whether the operand goes to FP8 tensor cores."""
        if spec.format == "mxfp4":
            return not self._exact_mxfp4 and _has_fp8_rows(device)
        return spec.row.family == "fp8"

    def quantize(
        self, x: Tensor, casts: Sequence[Cast], reduce_amax: ReduceAmax | None = None
    ) -> list[TritonOperand]:
        """One operand of x [rows, cols] for each cast; see ``Backend.quantize``."""
        made: list[TritonOperand | None] = [None] * len(casts)
        todo = []
        for i, cast in enumerate(casts):
            if cast.spec.quantized:
                todo.append(i)
            else:
                v = (x if x.dtype == torch.bfloat16 else x.bfloat16()).detach()
                v = v.t() if cast.transpose else v
                made[i] = TritonOperand(v, (v.shape[0], v.shape[1]))
        if todo:
            x = x.detach()
            if x.stride(0) != 1 and x.stride(1) != 1:
                x = x.contiguous()
            copies = {i: self._copy(casts[i], x.device) for i in todo}
            pairs = list(
                zip_longest(
                    [i for i in todo if not casts[i].transpose],
                    [i for i in todo if casts[i].transpose],
                )
            )
            amaxes = _all_amaxes(x, copies, pairs)
            if reduce_amax is not None:
                _reduce(amaxes, [i for i in todo if copies[i].amax == "tensor"], reduce_amax)
            for r, c in pairs:
                self._cast_pair(x, casts, copies, amaxes, (r, c), made)
        return made  # type: ignore[return-value]

    def _cast_pair(
        self,
        x: Tensor,
        casts: Sequence[Cast],
        copies: dict[int, Copy],
        amaxes: dict[int, Tensor],
        pair: tuple[int | None, int | None],
        made: list[TritonOperand | None],
    ) -> None:
        r, c = pair
        found = quantize(
            x,
            row=None if r is None else copies[r],
            col=None if c is None else copies[c],
            row_amax=None if r is None else amaxes.get(r),
            col_amax=None if c is None else amaxes.get(c),
            lost=self._lost_counts(x.device),
        )
        for i, q in zip(pair, found, strict=True):
            if i is not None and q is not None:
                made[i] = _operand(q, casts[i].spec, copies[i])

    def _copy(self, cast: Cast, device: torch.device) -> Copy:
        spec = cast.spec
        output = "exact"
        if spec.row.family == "fp8" or (cast.kept and spec.row.family == "nvfp4"):
            output = "codes"
        elif spec.format == "mxfp4" and self._in_fp8(spec, device):
            output = "e4m3"
        n = cast.noise
        noise = None
        if n is not None:
            noise = Noise(
                n.key, n.row_offset, n.col_offset, n.row_part, n.row_gap, n.col_part, n.col_gap
            )
        return Copy(
            spec.format,
            spec.block,
            spec.rounding,
            spec.ties,
            spec.scale,
            output,
            cast.rotation_size,
            cast.signs,
            noise,
        )

    def _lost_counts(self, device: torch.device) -> Tensor:
        if device not in self._lost:
            self._lost[device] = torch.zeros(2, dtype=torch.int32, device=device)
        return self._lost[device]

    def lost(self, device: torch.device) -> tuple[int, int]:
        """MXFP4 elements that E4M3 could not hold so far: (row copies, column copies). Waits."""
        row, col = self._lost_counts(device).tolist()
        return row, col

    def gemm(
        self,
        a: TritonOperand,
        b: TritonOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
    ) -> Tensor:
        """a @ b.T; see ``Backend.gemm``."""
        av, bv = a.values(), b.values()
        alpha = _product(a.alpha, b.alpha)
        plain = alpha is None and a.factors is None and b.factors is None
        if plain and accumulate_into is None and av.dtype == torch.bfloat16:
            if out_dtype == torch.float32:
                return torch.mm(av, bv.t(), out_dtype=torch.float32)
            return torch.mm(av, bv.t()).to(out_dtype)
        out = accumulate_into
        if out is None or out.dtype != torch.float32 or out.stride(1) != 1:
            dtype = out_dtype if out_dtype == torch.bfloat16 and out is None else torch.float32
            target = torch.empty((av.shape[0], bv.shape[0]), dtype=dtype, device=av.device)
        else:
            target = out
        scales = None
        if a.factors is not None or b.factors is not None:
            scales = (_factors(a, alpha), _factors(b, None))
            alpha = None
        cublaslt.matmul(
            av,
            bv,
            target,
            alpha=alpha,
            accumulate=target is out,
            scales=scales,
            # as Transformer Engine: narrow accumulation forward and for dx, full for main gradients
            fast_accum=av.dtype in _FP8 and out is None,
        )
        if target is out:
            return out
        return target.to(out_dtype) if out is None else out.add_(target)


def operand_specs(gemm: Gemm) -> list[QuantSpec]:
    """The casts of a GEMM's two operands."""
    return [getattr(gemm, name) for name in OPERANDS[type(gemm).__name__.lower()]]


@cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _has_fp8_rows(device: torch.device) -> bool:
    """FP8 GEMMs with a factor a row (cuBLASLt's outer vectors) are Hopper's."""
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def _four_thirds(device: torch.device) -> Tensor:
    return torch.tensor(4.0 / 3.0, dtype=torch.float32, device=device)


def _operand(q: Quantized, spec: QuantSpec, copy: Copy) -> TritonOperand:
    alpha = q.alpha
    if spec.row.family == "mx" and spec.scale == "unbiased":
        alpha = _four_thirds(q.out.device)
    if copy.output == "codes" and spec.row.element.packed:
        return TritonOperand(q.out, q.shape, alpha, scales=q.scales)
    factors = None if q.scales is None else q.scales.reshape(-1)
    return TritonOperand(q.out, q.shape, alpha, factors)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _factors(operand: TritonOperand, alpha: Tensor | None) -> Tensor:
    """fp32 [rows]; ``alpha``, what remains of both operands, goes with the first one's."""
    factors = operand.factors
    if factors is None:
        factors = torch.ones(operand.shape[0], dtype=torch.float32, device=operand.data.device)
    return factors if alpha is None else factors * alpha


def _all_amaxes(
    x: Tensor, copies: dict[int, Copy], pairs: list[tuple[int | None, int | None]]
) -> dict[int, Tensor]:
    """Amaxes by cast: one launch for each pair and kind."""
    found: dict[int, Tensor] = {}
    for pair in pairs:
        for kind, measure in (("tensor", tensor_amaxes), ("row", line_amax)):
            wanted = [i if i is not None and copies[i].amax == kind else None for i in pair]
            if wanted == [None, None]:
                continue
            turns = [None if i is None else (copies[i].rotation, copies[i].signs) for i in wanted]
            measured = measure(x, row=turns[0], col=turns[1])
            for i, side in zip(wanted, (0, 1), strict=True):
                if i is not None:
                    found[i] = _tile_rows(measured[side], copies[i])
    return found


def _tile_rows(amax: Any, copy: Copy) -> Tensor:
    """Row amaxes of a 2d copy: a tile's scale is seen by each of its rows."""
    if copy.amax != "row" or copy.block != "2d":
        return amax
    length = copy.block_length
    return amax.view(-1, length).amax(dim=1).repeat_interleave(length)


def _reduce(amaxes: dict[int, Tensor], tensors: list[int], reduce_amax: ReduceAmax) -> None:
    if tensors:
        reduced = reduce_amax(torch.stack([amaxes[i].reshape(()) for i in tensors]))
        for i, amax in zip(tensors, reduced, strict=True):
            amaxes[i] = amax
