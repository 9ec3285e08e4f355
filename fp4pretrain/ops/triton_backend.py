"""The Triton backend: fused casts, and GEMMs on the tensor cores that every NVIDIA GPU since Ampere has.

What an operand becomes, by its format (FP8 tensor cores: Ada, Hopper and later):

    format            operand                                         GEMM
    bf16              the tensor itself, or a view of it              cuBLAS
    nvfp4, mxfp8      element x block scale, exact in BF16            cuBLASLt, tensor scales as alpha
    mxfp4             E4M3 under one power of two a row               cuBLASLt FP8, row factors
    mxfp4, no FP8     element x block scale, exact in BF16            cuBLASLt
    fp8 tensor, row   FP8 codes                                       cuBLASLt FP8, alpha or row factors
    fp8 128-blocks    FP8 codes and the blocks' factors               cuBLASLt on Hopper, else Triton

A row-wise and a column-wise copy come from one read of the tensor, and their amaxes from another. An
operand that is saved for the backward pass is packed where that is smaller (nvfp4, mxfp4) and expanded when
its GEMM comes. Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from fp4_kernels import cublaslt
from fp4_kernels import spec as kernel_spec
from fp4_kernels.amax import amax as tensor_amaxes
from fp4_kernels.amax import line_amax
from fp4_kernels.quantize import Quantized, quantize
from fp4_kernels.spec import LEFT_TURN, Copy, Noise
from torch import Tensor

from fp4pretrain import numerics
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import handed
from fp4pretrain.ops.backend import ReduceAmax
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.handed import Awaited
from fp4pretrain.ops.operand import Operand
from fp4pretrain.ops.selfcheck import blocks_by_cublaslt
from fp4pretrain.ops.triton_operand import TritonOperand, multiply, operand_of
from fp4pretrain.precision import Gemm, Recipe

_PACKED = ("nvfp4", "mxfp4")  # 0.56 and 0.53 bytes an element
_LEAST = 16  # the kernels' unit along the contraction axis


class TritonBackend:
    """Triton casts, cuBLASLt GEMMs.

    ``mxfp4_emulation``: what carries MXFP4 to tensor cores that have no FP4. ``fp8``: E4M3 under one
    power of two a row, at FP8 speed; it holds blocks down to 2^14 under the largest of their row
    exactly, and ``counters`` has the elements that were rounded. ``bf16``: exact, at BF16 speed.
    """

    name = "triton"
    multiplies_codes = False  # packed ones, by tensor cores that take them

    def __init__(self, *, mxfp4_emulation: str = "fp8") -> None:
        self._mxfp4_in_fp8 = mxfp4_emulation == "fp8"
        self._lost: dict[torch.device, Tensor] = {}
        self._copies: dict[tuple[int, torch.device], Copy] = {}

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
        return self._why_not_specs(list(gemm.specs), gemm, device)

    def why_not_cast(self, spec: QuantSpec, device: torch.device) -> str | None:
        """None if the kernels make such an operand, otherwise the reason in one clause."""
        if not spec.quantized:
            return None
        return kernel_spec.why_missing(
            spec.format, block=spec.block, scale=spec.scale, rounding=spec.rounding, ties=spec.ties
        )

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """The matrix instruction that cuBLASLt has for the operands on the device."""
        major = torch.cuda.get_device_capability(device)[0]
        family = {9: "wgmma", 10: "tcgen05.mma"}.get(major, "mma.sync")
        specs = list(gemm.specs)
        if all(_in_blocks(s) for s in specs):
            by = "cuBLASLt" if blocks_by_cublaslt(device) else "Triton"
            return f"{family} e4m3/e5m2, scaled in blocks of 128 ({by})"
        if not all(self._in_fp8(spec, device) for spec in specs):
            return f"{family} bf16 (cuBLASLt)"
        fast = ", fast accumulation" if gemm.fast_accum else ""
        return f"{family} e4m3/e5m2{fast} (cuBLASLt)"

    def _why_not_specs(
        self, specs: list[QuantSpec], gemm: Gemm, device: torch.device
    ) -> str | None:
        blocks = [_in_blocks(s) for s in specs]
        if any(blocks) and not all(blocks):
            return "FP8 in blocks of 128 needs both operands so"
        if gemm.rotation.active and not all(s.quantized for s in specs):
            return "it rotates only while casting below BF16"
        fp8 = [self._in_fp8(s, device) for s in specs]
        if any(fp8) and not all(fp8):
            return f"{specs[0].format} and {specs[1].format} do not meet in one tensor-core format"
        if all(s.format == "fp8_e5m2" for s in specs) and not all(blocks):
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
            return self._mxfp4_in_fp8 and _has_fp8_rows(device)
        return spec.row.family == "fp8"

    def quantize(
        self,
        x: Tensor,
        casts: Sequence[Cast],
        reduce_amax: ReduceAmax | None = None,
        partners: Sequence[Operand | None] = (),
    ) -> list[TritonOperand]:
        """One operand of x [rows, cols] for each cast; see ``Backend.quantize``."""
        if x.requires_grad:
            x = x.detach()
        if x.stride(0) != 1 and x.stride(1) != 1:
            x = x.contiguous()
        shape = (x.shape[0], x.shape[1])
        made: list[Any] = [None] * len(casts)
        sides: list[list[int]] = [[], []]  # casts of x, and of its transpose
        copies: dict[int, Copy] = {}
        padded = []
        for i, cast in enumerate(casts):
            if not cast.spec.quantized or not x.numel():
                made[i] = _uncast(x, cast)
                continue
            copies[i] = self._copy_of(cast, x.device)
            if _padding(cast, shape) == (0, 0):
                sides[cast.transpose].append(i)
            else:
                padded.append(i)
        pairs: Iterator[Any] = zip_longest(*sides)
        jobs = [_Job(x, pair, (0, 0)) for pair in pairs]
        jobs += [_padded_job(x, casts[i], i) for i in padded]
        given = handed.take(x, casts)
        amaxes = [_amaxes(job, copies, given if job.x is x else {}) for job in jobs]
        if reduce_amax is not None:
            _reduce(amaxes, casts, reduce_amax)
        alphas = [p.alpha if isinstance(p, TritonOperand) else None for p in partners]
        alphas = alphas or [None] * len(casts)
        for job, found in zip(jobs, amaxes, strict=True):
            self._cast_pair(job, casts, copies, found, alphas, made)
        return made

    def awaits(self, casts: Sequence[Cast], device: torch.device) -> Awaited | None:
        """What ``quantize`` will ask of a tensor cast so; see ``Backend.awaits``."""
        turns = []
        for cast in casts:
            if not cast.spec.quantized:
                continue
            copy = self._copy_of(cast, device)
            turn = copy.turn
            left = not turn.size or (turn.size == LEFT_TURN and cast.transpose)
            whole = copy.amax == "tensor" and cast.spec.split == "none"
            if not (left and whole) or cast.site is None:
                return None
            turns.append((cast.site, turn))
        alike = len({turn for _, turn in turns if turn.size}) < 2
        return handed.Awaited(tuple(turns)) if turns and alike else None

    def _cast_pair(
        self,
        job: _Job,
        casts: Sequence[Cast],
        copies: dict[int, Copy],
        amaxes: dict[int, Tensor],
        alphas: Sequence[Tensor | None],
        made: list[Any],
    ) -> None:
        x, (r, c) = job.x, job.pair
        row, col = (None if i is None else copies[i] for i in job.pair)
        e4m3 = (row is not None and row.output == "e4m3") or (
            col is not None and col.output == "e4m3"
        )
        found = quantize(
            x,
            row=row,
            col=col,
            row_amax=None if r is None else amaxes.get(r),
            col_amax=None if c is None else amaxes.get(c),
            lost=self._lost_counts(x.device) if e4m3 else None,
            partners=(None if r is None else alphas[r], None if c is None else alphas[c]),
        )
        for i, q in zip(job.pair, found, strict=True):
            if i is not None and q is not None:
                spec, lost = casts[i].spec, None
                packed = copies[i].output == "codes" and spec.format == "mxfp4"
                if packed and self._in_fp8(spec, x.device):
                    lost = self._lost_counts(x.device)[1]
                q = _cut(q, copies[i], job.cut)
                native = self.multiplies_codes
                made[i] = operand_of(
                    q, spec, copies[i], lost=lost, partner=alphas[i], native=native
                )

    def _copy_of(self, cast: Cast, device: torch.device) -> Copy:
        """Launch arguments for a cast, cached by everything but its noise key and signs."""
        copy = self._copies.get((cast.kind, device))
        if copy is None:
            copy = self._copies[cast.kind, device] = self._copy(cast, device)
        if cast.noise is None and cast.signs is copy.signs:
            return copy
        return copy.drawn(_noise(cast.noise), cast.signs, cast.draw)

    def _copy(self, cast: Cast, device: torch.device) -> Copy:
        spec = cast.spec
        output = "exact"
        if spec.row.family == "fp8" or (cast.saved and spec.format in _PACKED):
            output = "codes"
        elif spec.format == "mxfp4" and self._in_fp8(spec, device):
            output = "e4m3"
        return Copy(
            spec.format,
            spec.block,
            spec.rounding,
            spec.ties,
            spec.scale,
            output,
            cast.rotation_size,
            cast.signs,
            _noise(cast.noise),
            cast.rotated_fp32,
        )

    def _lost_counts(self, device: torch.device) -> Tensor:
        if device not in self._lost:
            self._lost[device] = torch.zeros(2, dtype=torch.int64, device=device)
        return self._lost[device]

    def counters(self, recipes: Sequence[Recipe], device: torch.device) -> dict[str, Tensor]:
        """``mxfp4_inexact``: elements that E4M3 could not hold, where MXFP4 goes to FP8."""
        specs = [spec for recipe in recipes for _, _, spec in recipe.operands()]
        if not any(s.format == "mxfp4" and self._in_fp8(s, device) for s in specs):
            return {}
        return {"mxfp4_inexact": self._lost_counts(device).sum()}

    def gemm(
        self,
        a: TritonOperand,
        b: TritonOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
        fast_accum: bool = False,
    ) -> Tensor:
        """a @ b.T; see ``Backend.gemm``."""
        return multiply(
            a,
            b,
            out_dtype=out_dtype,
            out=accumulate_into,
            fast_accum=fast_accum,
            blocks_by_cublaslt=a.blocks is not None and blocks_by_cublaslt(a.data.device),
        )


@cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _has_fp8_rows(device: torch.device) -> bool:
    """FP8 GEMMs with a factor a row (cuBLASLt's outer vectors) are Hopper's."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _noise(n: numerics.Noise | None) -> Noise | None:
    if n is None:
        return None
    return Noise(n.key, n.row_offset, n.col_offset, n.row_part, n.row_gap, n.col_part, n.col_gap)


def _in_blocks(spec: QuantSpec) -> bool:
    """FP8 with a factor for each 1x128 or 128x128."""
    return spec.row.family == "fp8" and spec.block in ("1d", "2d")


@dataclass(frozen=True)
class _Job:
    """One launch: x, the casts (row, column) it serves, and the rows each copy is cut to (0: none)."""

    x: Tensor
    pair: tuple[int | None, int | None]
    cut: tuple[int, int]


def _padding(cast: Cast, shape: tuple[int, int]) -> tuple[int, int]:
    """Zeros to append to (rows, columns) of the operand: the kernels take whole blocks of sixteen."""
    rows, length = (shape[1], shape[0]) if cast.transpose else shape
    tall = max((block[0] for block in cast.spec.level_blocks), default=1) or 1
    return -rows % tall, -length % math.lcm(cast.multiple, cast.spec.contraction_block, _LEAST)


def _padded_job(x: Tensor, cast: Cast, index: int) -> _Job:
    """A launch of its own for a copy whose blocks do not divide x: it reads a copy of x padded with zeros."""
    rows, cols = _padding(cast, (x.shape[0], x.shape[1]))
    if cast.transpose:
        return _Job(F.pad(x, (0, rows, 0, cols)), (None, index), (0, x.shape[1]))
    return _Job(F.pad(x, (0, cols, 0, rows)), (index, None), (x.shape[0], 0))


def _cut(q: Quantized, copy: Copy, cut: tuple[int, int]) -> Quantized:
    """The copy without the rows that only pad 2d tiles. Scales of tiles become one a row: a tile is cut."""
    rows = cut[0] or cut[1]
    if not rows or rows == q.shape[0]:
        return q
    scales = q.scales
    if scales is not None and copy.output == "codes" and scales.dtype != torch.float32:
        tall = q.shape[0] // scales.shape[0]
        bytes_ = scales.view(torch.uint8).repeat_interleave(tall, 0)[:rows]
        scales = bytes_.contiguous().view(scales.dtype)
    elif scales is not None and scales.shape[0] == q.shape[0]:
        scales = scales[:rows]
    return Quantized(q.out[:rows], scales, q.alpha, (rows, q.shape[1]), q.paired)


def _uncast(x: Tensor, cast: Cast) -> TritonOperand:
    """x or its transpose in BF16, padded with zeros as its GEMM's other operand is."""
    v = x if x.dtype == torch.bfloat16 else x.bfloat16()
    v = v.t() if cast.transpose else v
    padding = cast.padding(v.shape[1])
    if padding:
        v = F.pad(v, (0, padding))
    return TritonOperand(v, (v.shape[0], v.shape[1]))


def _amaxes(job: _Job, copies: dict[int, Copy], given: dict[int, Tensor]) -> dict[int, Tensor]:
    """Amaxes by cast: those that were handed with the tensor, else one launch for each kind."""
    found = {i: given[i] for i in job.pair if i in given}
    if len(found) == sum(i is not None and copies[i].amax != "none" for i in job.pair):
        return found
    kinds = ["none" if i is None else copies[i].amax for i in job.pair]
    for kind in dict.fromkeys(kinds):
        if kind == "none":
            continue
        wanted = [i if k == kind else None for i, k in zip(job.pair, kinds, strict=True)]
        turns = [None if i is None else copies[i].turn for i in wanted]
        sides: Any
        if kind == "tensor":
            sides = tensor_amaxes(job.x, row=turns[0], col=turns[1]).unbind()
        else:
            sides = line_amax(job.x, row=turns[0], col=turns[1])
        for i, side in zip(wanted, sides, strict=True):
            if i is not None:
                found[i] = _tile_rows(side, copies[i])
    return found


def _tile_rows(amax: Any, copy: Copy) -> Tensor:
    """Row amaxes of a 2d copy: each row gets the largest magnitude of the tiles that it is in."""
    if copy.amax != "row" or copy.block != "2d":
        return amax
    length = copy.block_length
    return amax.view(-1, length).amax(dim=1).repeat_interleave(length)


def _reduce(
    amaxes: list[dict[int, Tensor]], casts: Sequence[Cast], reduce_amax: ReduceAmax
) -> None:
    """Replace the amaxes of shared casts, in the order of the casts, by the whole tensor's."""
    where = {i: found for found in amaxes for i in found if casts[i].asks}
    order = sorted(where)
    reduced = reduce_amax([where[i][i] for i in order])
    for i, amax in zip(order, reduced, strict=True):
        where[i][i] = amax
