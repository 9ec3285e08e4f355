"""The reference's operands on a CPU, each cast by C++ in two passes over memory; torch multiplies them.

PyTorch runs a cast as some thirty operations, each with a pass of its own. ``fp4_kernels.cpu`` has them as
two functions, which are compiled where they run: one makes the matrix that is cast (transposed, padded,
rotated) and measures it, the other rounds it in place. Every format, block, scale rule and rounding of the
tables has the reference's bits there, so a run may change between the two. An operand in BF16, one without
elements, and one that is refused go through the reference.

The library is trusted once it has cast small matrices as the reference does, in every process.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from fp4_kernels.cpu import library
from torch import Tensor

from fp4pretrain import numerics
from fp4pretrain.files import user_cache
from fp4pretrain.numerics import QuantSpec, every_spec, spanning_amax
from fp4pretrain.numerics.scaling import capped_rule, mx_stretch
from fp4pretrain.ops.backend import ReduceAmax
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand
from fp4pretrain.ops.reference import EmulatedOperand, ReferenceBackend, emulated, oriented
from fp4pretrain.precision import Gemm

_SCALES = ("e4m3", "ue5m3", "e8m0", "fp32")
_SPANS = ("block", "row", "tensor")
_TIES = ("even", "away")
_DRAWN = ("stochastic", "stochastic_full")
# By scale rule: its number among those of its type of scales. A rule that only sets constants has none.
_RULES = {
    "four_over_six": 1,
    "ceil": 1, "even": 2, "rceil": 3, "full_grid": 4, "full_grid_adaptive": 5,
    "pow2": 1,
}  # fmt: skip
_GROUP = 128  # of MS-EDEN without a rotation


class CppBackend(ReferenceBackend):
    """C++ casts, torch's matmul."""

    name = "cpp"

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""
        if device.type != "cpu":
            return f"its casts run on CPUs, not on {device.type}"
        return why_missing()

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """What multiplies there, and who casts."""
        casts = ", C++ casts" if any(spec.quantized for spec in gemm.specs) else ""
        return super().instruction(gemm, device) + casts

    def quantize(
        self,
        x: Tensor,
        casts: Sequence[Cast],
        reduce_amax: ReduceAmax | None = None,
        partners: Sequence[Operand | None] = (),
    ) -> list[Operand]:
        """One operand of x [rows, cols] for each cast; see ``Backend.quantize``."""
        ours = [_is_ours(x, cast) for cast in casts]
        read = x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)
        turned: list[Tensor] = []
        amaxes: list[Tensor | None] = []
        for cast, fused in zip(casts, ours, strict=True):
            y, amax = _oriented(read, cast) if fused else _by_reference(x, cast)
            turned.append(y)
            amaxes.append(amax)
        if reduce_amax is not None:
            asking = [i for i, c in enumerate(casts) if c.asks and amaxes[i] is not None]
            for i, found in zip(asking, reduce_amax([amaxes[i] for i in asking]), strict=True):
                amaxes[i] = found
        return [
            (_cast if fused else emulated)(y, cast, amax)
            for y, cast, amax, fused in zip(turned, casts, amaxes, ours, strict=True)
        ]


@cache
def why_missing() -> str | None:
    """None where the library is here and casts as the reference does, otherwise the reason in a clause."""
    try:
        _library()
    except library.Unavailable as error:
        return str(error)
    return self_check()


def self_check() -> str | None:
    """None if small casts are the reference's bit for bit, otherwise which is not.

    Every row of the formats' table is tried, every block and scale rule by each type of scales that has
    it, every rounding; each with a rotation or without, from a matrix or its transpose.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 144, generator=g) * torch.exp2(torch.randint(-9, 9, (20, 1), generator=g))
    x[::2] = (x[::2] * 8).round() / 8  # under powers of two such numbers are ties
    x[3, :40] = 0.0
    signs = tuple(1 - 2 * (i % 3 == 1) for i in range(16))
    mine, reference = CppBackend(), ReferenceBackend()
    for number, spec in enumerate(_checked_specs()):
        cast = Cast(
            spec,
            transpose=number % 2 == 1,
            multiple=16,
            rotation_size=16 * (number % 3 > 0),
            rotated_fp32=number % 3 == 1,
            signs=signs if number % 3 == 2 else None,
            noise=numerics.Noise(number, 5, 37, 8, 3, 48, 16) if spec.stochastic else None,
        )
        tensor = x if number % 5 else x.bfloat16()
        (got,), (want,) = (backend.quantize(tensor, [cast]) for backend in (mine, reference))
        if not _same_bits(got, want):
            return f"its {spec.format} cast of a self-check is not the reference's ({spec})"
    return None


def _checked_specs() -> list[QuantSpec]:
    """A few specs that have every word of the tables between them."""
    seen: set[tuple[str, ...]] = set()
    chosen = []
    for spec in every_spec():
        scales = spec.row.scale_type
        words = {(spec.format,), (scales, spec.rounding, spec.ties)}
        words |= {(scales, spec.scale), (scales, spec.block, spec.amax_span)}
        if spec.quantized and not words <= seen:
            seen |= words
            chosen.append(spec)
    return chosen


def _same_bits(a: Operand, b: Operand) -> bool:
    """Whether two operands hold the same numbers, signs of zeros among them; NaN equals NaN."""
    assert isinstance(a, EmulatedOperand)
    assert isinstance(b, EmulatedOperand)
    pairs = zip((a.values, a.alpha), (b.values, b.alpha), strict=True)
    return all(s is not None and t is not None and same_bits(s, t) for s, t in pairs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two fp32 tensors hold the same numbers, signs of zeros among them; NaN equals NaN."""
    if a.shape != b.shape:
        return False
    bits = [t.contiguous().view(torch.int32) for t in (a, b)]
    return bool(((bits[0] == bits[1]) | (a.isnan() & b.isnan())).all())


@cache
def _library() -> ctypes.CDLL:
    return library.load(user_cache() / "casts")


def _is_ours(x: Tensor, cast: Cast) -> bool:
    """Whether the library makes the cast; the reference does the others, and refuses those it must."""
    if not cast.spec.quantized or not x.numel() or x.device.type != "cpu":
        return False
    if cast.spec.stochastic and cast.noise is None:
        return False
    length = x.shape[0] if cast.transpose else x.shape[1]
    return not cast.rotation_size or (length + cast.padding(length)) % cast.rotation_size == 0


def _by_reference(x: Tensor, cast: Cast) -> tuple[Tensor, Tensor | None]:
    y = oriented(x, cast)
    return y, spanning_amax(y, cast.spec)


def _oriented(x: Tensor, cast: Cast) -> tuple[Tensor, Tensor | None]:
    """``oriented`` in fp32, and its ``spanning_amax``."""
    x = x.t() if cast.transpose else x
    rows, cols = x.shape
    out = torch.empty((rows, cols + cast.padding(cols)), dtype=torch.float32)
    span = cast.spec.amax_span
    amax = (
        None if span == "block" else torch.empty(rows if span == "row" else (), dtype=torch.float32)
    )
    size = cast.rotation_size
    status = _library().fp4_orient(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        rows,
        cols,
        *x.stride(),
        out.data_ptr(),
        out.shape[1],
        size,
        None if cast.signs is None else _signs(cast.signs),
        1.0 / math.sqrt(size or 1),
        not cast.rotated_fp32,
        _SPANS.index(span),
        None if amax is None else amax.data_ptr(),
        torch.get_num_threads(),
    )
    _done(status, cast)
    return out, amax


def _cast(y: Tensor, cast: Cast, amax: Tensor | None) -> EmulatedOperand:
    """The operand of ``_oriented``'s y, which becomes its values."""
    rows, cols = y.shape
    by_row = cast.spec.amax_span == "row"
    alpha = torch.empty((rows, 1) if by_row else (), dtype=torch.float32)
    if amax is not None:
        amax = amax.to(torch.float32).contiguous()
    noise = None if cast.noise is None else ctypes.byref(_noise(cast.noise))
    status = _library().fp4_cast(
        y.data_ptr(),
        rows,
        cols,
        ctypes.byref(_spec(cast.spec, cast.rotation_size or _GROUP)),
        None if amax is None else amax.data_ptr(),
        noise,
        alpha.data_ptr(),
        torch.get_num_threads(),
    )
    _done(status, cast)
    return EmulatedOperand(y, alpha)


def _done(status: int, cast: Cast) -> None:
    if status:
        raise MemoryError(f"no memory for a cast of {cast.spec}")


@lru_cache(maxsize=4096)
def _signs(signs: tuple[int, ...]) -> Any:
    return (ctypes.c_float * len(signs))(*signs)


def _noise(n: numerics.Noise) -> library.NoiseSpec:
    return library.NoiseSpec(
        n.key, n.row_offset, n.col_offset, n.row_part, n.row_gap, n.col_part, n.col_gap
    )


@lru_cache(maxsize=4096)
def _spec(spec: QuantSpec, group: int) -> library.CastSpec:
    """A spec's words and constants as the library takes them; ``group``: see ``numerics.quantize``."""
    element, scales = spec.row.element, spec.row.scale_type
    blocks = [*spec.level_blocks, (0, 0)][:2]
    drawn = spec.rounding in _DRAWN
    numbers: dict[str, float] = {"alpha": 1.0, "inverse_max": 1.0 / element.max}
    if scales in ("e4m3", "ue5m3"):
        rule = capped_rule(spec)
        numbers |= {"outer_max": rule.outer_max, "inverse_max": 1.0 / rule.element_max}
    elif scales == "e8m0":
        numbers["stretch"], numbers["alpha"] = mx_stretch(spec)
    return library.CastSpec(
        scales=_SCALES.index(scales),
        rule=_RULES.get(spec.scale, 0),
        rounding=2 + _DRAWN.index(spec.rounding) if drawn else _TIES.index(spec.ties),
        span=_SPANS.index(spec.amax_span),
        eden=spec.rounding_row.scales,
        coded=element.coded,
        emin=element.emin,
        emax=element.emax,
        mantissa=element.mantissa_bits,
        max=element.max,
        block_rows=blocks[0][0],
        block_cols=blocks[0][1],
        outer_rows=blocks[1][0],
        outer_cols=blocks[1][1],
        group=group,
        **numbers,
    )
