"""The Transformer Engine backend: its quantizers and GEMM under our recipes, where they compute the same.

    format                      quantizer                               GEMM (``general_gemm``, cuBLASLt)
    bf16                        none                                    Ampere and later
    fp8, one scale a tensor     Float8CurrentScalingQuantizer; by a     Ada and later
                                given amax Float8Quantizer
    fp8, blocks of 128          Float8BlockQuantizer                    Hopper; powers of two also Blackwell
    mxfp8, scale rceil          MXFP8Quantizer                          Blackwell
    nvfp4                       NVFP4Quantizer                          Blackwell

Only a config that names it gets it; ``auto`` does not. Every GEMM that it takes is tried first, casts and
product, against the reference (``ops/engine_check.py``), so a release that computes something else is
refused. What differs where the casts of finite tensors are equal:

- a tensor that holds Inf gets the scale 1, and Inf becomes the largest element; ours is NaN throughout;
- stochastic rounding draws from torch's generator, seeded for each cast by the key of its site. So a
  resumed run and recompute draw alike, but another layout or another backend does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import FORMATS, QuantSpec
from fp4pretrain.nvidia import why_no_engine
from fp4pretrain.ops.backend import ReduceAmax
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.engine_check import why_wrong
from fp4pretrain.ops.engine_operand import EngineOperand, code_type
from fp4pretrain.ops.operand import Operand
from fp4pretrain.precision import Gemm, Recipe, Wgrad
from fp4pretrain.precision.recipe import Rotation

# Rows and columns are padded to these, which its kernels and cuBLASLt ask for.
_UNITS = {"bf16": 16, "tensor": 16, "blocks": 128, "mxfp8": 32, "nvfp4": 32}
_WGRAD_ROTATION = Rotation("random_hadamard", 16, "never", "te")
_BLACKWELL = "Transformer Engine casts and multiplies {} on Blackwell alone"


class EngineBackend:
    """Transformer Engine's quantizers and ``general_gemm``."""

    name = "transformer_engine"

    def __init__(self) -> None:
        self._quantizers: dict[tuple, Any] = {}
        self._checked: dict[tuple[Gemm, torch.device], str | None] = {}

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"its kernels run on NVIDIA GPUs, not on {device.type}"
        missing = why_no_engine()
        if missing is not None:
            return f"no {missing}"
        reason = _why_not_here(gemm, torch.cuda.get_device_capability(device))
        if reason is not None or any(self.why_not_cast(s, device) for s in gemm.specs):
            return reason  # what a cast lacks is said of the cast
        if (gemm, device) not in self._checked:
            self._checked[gemm, device] = why_wrong(self, gemm, device)
        return self._checked[gemm, device]

    def why_not_cast(self, spec: QuantSpec, device: torch.device) -> str | None:
        """None if one of its quantizers makes such an operand, otherwise the reason in one clause."""
        kind = _kind(spec)
        if kind is None:
            there = f"format={spec.format} block={spec.block}"
            return f"Transformer Engine has no cast for {there}"
        rules = {"mxfp8": ("rceil",), "nvfp4": ("default",)}.get(kind, spec.row.scale_rules)
        if spec.scale not in rules:
            return f"scale={spec.scale}: Transformer Engine's {spec.format} has {' '.join(rules)} alone"
        if spec.rounding not in ("nearest", "stochastic"):
            return f"rounding={spec.rounding}: Transformer Engine has nearest and stochastic"
        if spec.ties != "even":
            return f"ties={spec.ties}: Transformer Engine's go to even"
        if kind == "nvfp4" and spec.amax != "current":
            return f"amax={spec.amax}: Transformer Engine measures NVFP4's amax in its cast"
        return None

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """The library that multiplies, and whose noise it is."""
        first = gemm.specs[0]
        fast = ", fast accumulation" if gemm.fast_accum and _kind(first) == "tensor" else ""
        noise = "; its own noise" if any(s.stochastic for s in gemm.specs) else ""
        return f"{first.format}{fast} (Transformer Engine, cuBLASLt{noise})"

    def quantize(
        self,
        x: Tensor,
        casts: Sequence[Cast],
        reduce_amax: ReduceAmax | None = None,
        partners: Sequence[Operand | None] = (),
    ) -> list[EngineOperand]:
        """One operand of x [rows, cols] for each cast; see ``Backend.quantize``.

        Raises:
            UserError: where NVFP4's amax is another than this tensor's, or x is to be rotated in FP32.
        """
        x = x.detach().contiguous()
        if x.dtype != torch.bfloat16 and any(c.rotation_size for c in casts):
            raise UserError(
                "precision.backend: transformer_engine rotates BF16 alone; use auto, or "
                "optim.params_dtype=bf16"
            )
        given: dict[int, Tensor] = {}
        if reduce_amax is not None:
            asking = [i for i, c in enumerate(casts) if c.asks and c.spec.amax_span == "tensor"]
            if any(_kind(casts[i].spec) == "nvfp4" for i in asking):
                raise UserError(
                    "precision.backend: transformer_engine measures NVFP4's amax in its cast, so the shards "
                    "of a tensor cannot share one; use precision.amax=rank, parallel.tensor=1 or auto"
                )
            amax = _measured(x)
            given = dict(zip(asking, reduce_amax([amax for _ in asking]), strict=True))
        made: list[Any] = [None] * len(casts)
        for group in _groups(casts, given):
            row, col = (next((i for i in group if casts[i].transpose == t), None) for t in (0, 1))
            amax_used = given.get(group[0])
            pair = (
                None if row is None else casts[row],
                None if col is None else casts[col],
            )
            for i, operand in zip((row, col), self._pair(x, pair, amax_used), strict=True):
                if i is not None:
                    made[i] = operand
        return made

    def _pair(
        self, x: Tensor, pair: tuple[Cast | None, Cast | None], amax: Tensor | None
    ) -> tuple[EngineOperand | None, EngineOperand | None]:
        """The operands of x and of its transpose by casts of one spec, from one call."""
        row, col = pair
        cast = row or col
        assert cast is not None
        kind = _kind(cast.spec) or "bf16"
        unit = _UNITS[kind]
        tall = math.lcm(unit, col.multiple if col else 1)
        wide = math.lcm(unit, row.multiple if row else 1)
        rows, cols = x.shape
        padded = F.pad(x, (0, -cols % wide, 0, -rows % tall)) if rows % tall or cols % wide else x
        if kind == "bf16" or not x.numel():
            sides: Any = (_plain(padded), _plain(padded, columns=True))
        else:
            # of FP8 by one scale its kernel writes no transpose alone
            rows_too = row is not None or kind == "tensor"
            with _seeded(cast, x.device):
                stored = self._quantizer(cast, rows_too, col is not None, amax)(padded)
            sides = _sides(stored, kind, cast.spec)
        shapes = (rows, padded.shape[1]), (cols, padded.shape[0])
        found = []
        for wanted, fields, shape in zip(pair, sides, shapes, strict=True):
            made = None
            if wanted is not None:
                made = EngineOperand(
                    shape=shape, format=cast.spec.format, tiles=cast.spec.block == "2d", **fields
                )
            found.append(made)
        return found[0], found[1]

    def _quantizer(self, cast: Cast, row: bool, col: bool, amax: Tensor | None) -> Any:
        """Of a cast; ``amax`` where it is not x's own. Those without tensors are kept."""
        spec, rotated = cast.spec, bool(cast.rotation_size)
        if amax is not None:
            quantizer = _by_amax(spec, amax, row=row, col=col)
            quantizer.internal = True
            return quantizer
        key = spec, rotated, row, col
        if key not in self._quantizers:
            made = _by_spec(spec, rotated=rotated, row=row, col=col)
            made.internal = True  # its light classes: they are no tensors of torch
            self._quantizers[key] = made
        return self._quantizers[key]

    def awaits(self, casts: Sequence[Cast], device: torch.device) -> None:
        """None: its casts measure for themselves."""
        return None

    def gemm(
        self,
        a: EngineOperand,
        b: EngineOperand,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
        fast_accum: bool = False,
    ) -> Tensor:
        """a @ b.T; see ``Backend.gemm``."""
        rows, cols = a.shape[0], b.shape[0]
        out = accumulate_into
        if not rows or not cols or not a.shape[1]:
            return out if out is not None else a.data.new_zeros((rows, cols), dtype=out_dtype)
        swapped = a.columns and not b.columns  # a layout that its GEMM lacks: (b @ a.T).T
        first, second = (b, a) if swapped else (a, b)
        whole = first.lying[0] == first.shape[0] and second.lying[0] == second.shape[0]
        fp32 = out is not None and out.dtype == torch.float32 and out.is_contiguous()
        inside = out if fp32 and whole and not swapped else None
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        result = general_gemm(
            second.stored(),
            first.stored(),
            out_dtype=out_dtype if out is None else torch.float32,
            layout=("N" if second.columns else "T") + ("T" if first.columns else "N"),
            out=inside,
            accumulate=inside is not None,
            use_split_accumulator=not fast_accum,
        )[0]
        if inside is not None:
            return inside
        result = (result.t() if swapped else result)[:rows, :cols]
        return result.contiguous() if out is None else out.add_(result)

    def counters(self, recipes: Sequence[Recipe], device: torch.device) -> dict[str, Tensor]:
        """Nothing: its casts lose no more than the formats do."""
        return {}


@cache
def _kind(spec: QuantSpec) -> str | None:
    """Which of its quantizers makes such an operand; None where no quantizer does."""
    if not spec.quantized:
        return "bf16"
    if spec.row.family == "fp8":
        return {"tensor": "tensor", "1d": "blocks", "2d": "blocks"}.get(spec.block)
    blocks = {"mxfp8": ("1d",), "nvfp4": ("1d", "2d")}.get(spec.format, ())
    return spec.format if spec.block in blocks else None


def _why_not_here(gemm: Gemm, capability: tuple[int, int]) -> str | None:
    """What its GEMM lacks of one of ours, on a GPU of this capability."""
    first, second = gemm.specs
    kinds = [_kind(s) for s in (first, second)]
    if kinds[0] != kinds[1]:
        return f"{first.format} {first.block} and {second.format} {second.block} do not meet in its GEMM"
    kind = kinds[0]
    if gemm.rotation.active:
        there = isinstance(gemm, Wgrad) and gemm.rotation == _WGRAD_ROTATION
        if kind != "nvfp4" or not there:
            return "rotation: Transformer Engine rotates wgrad's NVFP4 operands alone, by its own 16 signs"
        if any(s.source == "forward" for s in gemm.specs):
            return "source=forward: Transformer Engine rotates BF16 alone, and not what was cast"
    if first.format == second.format == "fp8_e5m2":
        return "tensor cores multiply E5M2 with E4M3 only in cuBLASLt"
    if kind == "tensor" and capability < (8, 9):
        return "it needs FP8 tensor cores (Ada or later)"
    if kind == "blocks":
        if first.block == second.block == "2d":
            return "block=2d on both sides: its GEMM has 1d by 1d and 1d by 2d"
        if capability < (9, 0):
            return "it multiplies FP8 in blocks of 128 on Hopper and Blackwell"
        if capability >= (10, 0) and any(s.scale != "pow2" for s in (first, second)):
            return (
                "scale=default: on Blackwell it multiplies blocks of 128 as MXFP8; use scale=pow2"
            )
    if kind in ("mxfp8", "nvfp4") and capability < (10, 0):
        return _BLACKWELL.format(first.format)
    return None


def _groups(casts: Sequence[Cast], given: dict[int, Tensor]) -> Iterator[tuple[int, ...]]:
    """Casts in groups that one call makes: a cast of x and one of its transpose, or a cast alone.

    Stochastic casts go alone, since noise is seeded by site; so do rotated casts, since one side alone is
    rotated.
    """
    waiting: dict[tuple, int] = {}
    for i, cast in enumerate(casts):
        if cast.spec.stochastic or cast.rotation_size or i in given:
            yield (i,)
            continue
        other = waiting.pop((cast.spec, not cast.transpose), None)
        if other is not None:
            yield other, i
        elif (cast.spec, cast.transpose) in waiting:
            yield (i,)
        else:
            waiting[cast.spec, cast.transpose] = i
    for i in waiting.values():
        yield (i,)


def _measured(x: Tensor) -> Tensor:
    """The fp32 amax of x, a scalar."""
    import transformer_engine_torch as tex

    amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    if x.numel():
        tex.compute_amax(x, amax)
    return amax.reshape(())


def _by_amax(spec: QuantSpec, amax: Tensor, *, row: bool, col: bool) -> Any:
    """A quantizer of FP8 by one given scale, as current scaling makes it from an amax."""
    import transformer_engine.pytorch as te

    # A tensor: torch turns a number into a product with the reciprocal, which rounds twice
    largest = torch.tensor(FORMATS[spec.format].element.max, device=amax.device)
    scale = (largest / amax.to(torch.float32)).clamp(max=torch.finfo(torch.float32).max)
    if spec.scale == "pow2":
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = torch.where(amax > 0, scale, 1.0).where(amax < torch.inf, torch.nan).reshape(1)
    return te.Float8Quantizer(
        scale=scale,
        amax=torch.zeros_like(scale),
        fp8_dtype=code_type(spec.format),
        rowwise=row,
        columnwise=col,
    )


def _by_spec(spec: QuantSpec, *, rotated: bool, row: bool, col: bool) -> Any:
    """A quantizer that measures what it needs."""
    import transformer_engine.pytorch as te

    kind, codes, sides = _kind(spec), code_type(spec.format), dict(rowwise=row, columnwise=col)
    pow2 = spec.scale == "pow2"
    if kind == "tensor":
        device = torch.device("cuda", torch.cuda.current_device())
        return te.Float8CurrentScalingQuantizer(codes, device, force_pow_2_scales=pow2, **sides)
    if kind == "blocks":
        dims = 2 if spec.block == "2d" else 1
        return te.Float8BlockQuantizer(
            codes, force_pow_2_scales=pow2, block_scaling_dim=dims, **sides
        )
    if kind == "mxfp8":
        return te.MXFP8Quantizer(codes, **sides)
    return te.NVFP4Quantizer(
        codes,
        with_rht=rotated,
        with_post_rht_amax=rotated,
        with_2d_quantization=spec.block == "2d",
        stochastic_rounding=spec.stochastic,
        **sides,
    )


def _plain(x: Tensor, *, columns: bool = False) -> dict[str, Any]:
    return dict(kind="bf16", data=x.to(torch.bfloat16), columns=columns)


def _sides(stored: Any, kind: str, spec: QuantSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of ``EngineOperand``: of x and of its transpose, of what one of its quantizers made."""
    if kind == "tensor":
        scale, turned = stored._scale_inv, stored._transpose
        row = dict(kind=kind, data=stored._data, scale=scale)
        if turned is None:  # Blackwell reads FP8 either way
            return row, row | dict(columns=True)
        return row, dict(kind=kind, data=turned, scale=scale)
    row = dict(kind=kind, data=stored._rowwise_data, scale=stored._rowwise_scale_inv)
    col = dict(kind=kind, data=stored._columnwise_data, scale=stored._columnwise_scale_inv)
    if kind == "mxfp8":
        col["columns"] = True
    if kind == "nvfp4":
        row["amax"], col["amax"] = stored._amax_rowwise, stored._amax_columnwise
    return row, col


@contextmanager
def _seeded(cast: Cast, device: torch.device) -> Iterator[None]:
    """Seed the generator that its kernels draw from with the key of a stochastic cast; restore its state
    afterwards."""
    if cast.noise is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    before = generator.get_state()
    generator.manual_seed(cast.noise.key)
    try:
        yield
    finally:
        generator.set_state(before)
