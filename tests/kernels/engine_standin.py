"""A stand-in for the parts of Transformer Engine that the backend calls: its names and its layouts in memory
(read in release 2.20), with the reference's numerics on a CPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.numerics import Noise, QuantSpec, quantize, rotate, signs_te

CODES = SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2", kFloat4E2M1="e2m1")
_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass
class Stored:
    """What a quantizer made; field names are those of all of its classes together."""

    kind: str
    codes: str
    _data: Tensor | None = None
    _transpose: Tensor | None = None
    _scale_inv: Tensor | None = None
    _rowwise_data: Tensor | None = None
    _rowwise_scale_inv: Tensor | None = None
    _columnwise_data: Tensor | None = None
    _columnwise_scale_inv: Tensor | None = None
    _amax_rowwise: Tensor | None = None
    _amax_columnwise: Tensor | None = None
    tiles: bool = False


@dataclass
class _Quantizer:
    codes: str
    rowwise: bool = True
    columnwise: bool = True
    internal: bool = False

    def __call__(self, x: Tensor) -> Stored:
        assert self.internal and x.is_contiguous()
        assert self.rowwise or self.columnwise
        return self.cast(x)


@dataclass
class Float8CurrentScalingQuantizer(_Quantizer):
    device: Any = None
    force_pow_2_scales: bool = False
    reads_both_ways: bool = False  # Blackwell

    def __init__(self, codes: str, device: Any, **how: Any) -> None:
        self.__dict__.update(codes=codes, device=device, **how)

    def cast(self, x: Tensor) -> Stored:
        assert not any(n % 16 for n in x.shape)
        scale = "pow2" if self.force_pow_2_scales else "default"
        q = quantize(x, QuantSpec(f"fp8_{self.codes}", "tensor", scale=scale))
        return _whole(self, q.codes.view(torch.uint8), q.scales.reshape(1))


@dataclass
class Float8Quantizer(_Quantizer):
    scale: Any = None
    amax: Any = None

    def __init__(self, scale: Tensor, amax: Tensor, fp8_dtype: str, **how: Any) -> None:
        assert scale.shape == amax.shape == (1,)
        self.__dict__.update(scale=scale, amax=amax, codes=fp8_dtype, **how)

    def cast(self, x: Tensor) -> Stored:
        kind = _TYPES[self.codes]
        largest = torch.finfo(kind).max
        data = (x.float() * self.scale).clamp(-largest, largest).to(kind)
        return _whole(self, data.view(torch.uint8), 1 / self.scale)


def _whole(q: _Quantizer, data: Tensor, scale: Tensor) -> Stored:
    assert q.rowwise  # 2.20.2 refuses to make the transpose alone, by an error of its own
    turned = q.columnwise and not Float8CurrentScalingQuantizer.reads_both_ways
    col = data.t().contiguous() if turned else None
    return Stored("tensor", q.codes, _data=data, _transpose=col, _scale_inv=scale)


@dataclass
class Float8BlockQuantizer(_Quantizer):
    force_pow_2_scales: bool = True
    block_scaling_dim: int = 2

    def cast(self, x: Tensor) -> Stored:
        assert not any(n % 128 for n in x.shape)
        tiles = self.block_scaling_dim == 2
        scale = "pow2" if self.force_pow_2_scales else "default"
        spec = QuantSpec(f"fp8_{self.codes}", "2d" if tiles else "1d", scale=scale)
        sides = []
        for wanted, v in ((self.rowwise, x), (self.columnwise, x.t().contiguous())):
            q = quantize(v, spec)
            scales = q.scales if tiles else q.scales.t()
            scales = F.pad(scales, (0, -scales.shape[1] % 4), value=7.0).contiguous()
            sides += [q.codes.view(torch.uint8), scales] if wanted else [None, None]
        return Stored("blocks", self.codes, None, None, None, *sides, tiles=tiles)


@dataclass
class MXFP8Quantizer(_Quantizer):
    def cast(self, x: Tensor) -> Stored:
        assert not any(n % 32 for n in x.shape)
        spec = QuantSpec("mxfp8", "1d", scale="rceil")
        row, col = quantize(x, spec), quantize(x.t().contiguous(), spec)
        sides: list[Any] = [None] * 4
        if self.rowwise:
            sides[:2] = row.codes.view(torch.uint8), _padded(row.scales, 128, 4)
        if self.columnwise:  # as x lies
            codes = col.codes.view(torch.uint8).t().contiguous()
            scales = col.scales.view(torch.uint8).t().contiguous()
            sides[2:] = codes, _padded(scales, 4, 128)
        return Stored("mxfp8", self.codes, None, None, None, *sides)


@dataclass
class NVFP4Quantizer(_Quantizer):
    with_rht: bool = False
    with_post_rht_amax: bool = False
    with_2d_quantization: bool = False
    stochastic_rounding: bool = False

    def cast(self, x: Tensor) -> Stored:
        assert not any(n % 16 for n in x.shape) and self.with_rht == self.with_post_rht_amax
        block = "2d" if self.with_2d_quantization else "1d"
        noise, rounding = None, "nearest"
        if self.stochastic_rounding:
            g = torch.cuda.default_generators[0]
            noise, rounding = Noise(int(torch.randint(2**31, (), generator=g))), "stochastic"
        made = []
        for wanted, v in ((self.rowwise, x), (self.columnwise, x.t().contiguous())):
            if self.with_rht and v is not x:
                signs = torch.tensor(signs_te(), dtype=torch.float32)
                v = rotate(v, size=16, signs=signs, round_bf16=True)
            q = quantize(v, QuantSpec("nvfp4", block, rounding), noise=noise)
            tall = v.shape[0] // q.scales.shape[0]
            scales = _padded(q.scales.view(torch.uint8).repeat_interleave(tall, 0), 128, 4)
            made.append((q.codes, scales, q.amax.reshape(1)) if wanted else (None,) * 3)
        (rd, rs, ra), (cd, cs, ca) = made
        return Stored("nvfp4", self.codes, None, None, None, rd, rs, cd, cs, ra, ca)


def _padded(scales: Tensor, tall: int, wide: int) -> Tensor:
    bytes_ = scales.view(torch.uint8)
    rows, cols = bytes_.shape
    return F.pad(bytes_, (0, -cols % wide, 0, -rows % tall), value=3).contiguous()


def compute_amax(x: Tensor, amax: Tensor) -> None:
    """Of x, into amax [1]."""
    amax.copy_(x.abs().amax().float().reshape(1))


# Its classes, with the arguments that it takes.


def _tensor_storage(*, data: Tensor, fp8_scale_inv: Tensor, fp8_dtype: str, fake_dtype: Any) -> Any:
    return Stored("tensor", fp8_dtype, _data=data, _scale_inv=fp8_scale_inv)


def _block_storage(*fields: Any, fake_dtype: Any) -> Any:
    *sides, codes, _, tiles = fields
    return Stored("blocks", codes, None, None, None, *sides, tiles=tiles)


def _mxfp8_storage(*fields: Any, fake_dtype: Any) -> Any:
    *sides, codes, _, swizzled = fields
    assert swizzled is False
    return Stored("mxfp8", codes, None, None, None, *sides)


def _nvfp4_storage(*fields: Any, fake_dtype: Any) -> Any:
    *sides, row_amax, col_amax, codes, _, swizzled = fields
    assert swizzled is False
    return Stored("nvfp4", codes, None, None, None, *sides, row_amax, col_amax)


def general_gemm(
    A: Any,
    B: Any,
    *,
    out_dtype: torch.dtype,
    layout: str,
    out: Tensor | None,
    accumulate: bool,
    use_split_accumulator: bool,
) -> tuple:
    """[rows of B, rows of A] by the layouts it has; accumulates into FP32 alone."""
    assert layout in ("TN", "NN", "NT"), layout
    a, b = _read(A, turned=layout[0] == "N"), _read(B, turned=layout[1] == "T")
    product = b @ a.t()
    if out is None:
        return (product.to(out_dtype), None, None, None)
    assert accumulate and out.dtype == out_dtype and out.is_contiguous()
    return (out.add_(product.to(out_dtype)), None, None, None)


def _read(s: Any, *, turned: bool) -> Tensor:
    """fp32 [rows, k] of an operand, read as its kind is with such a letter of the layout."""
    if isinstance(s, Tensor):
        return (s.t() if turned else s).float()
    if s.kind == "tensor":
        assert not turned or Float8CurrentScalingQuantizer.reads_both_ways
        values = s._data.view(_TYPES[s.codes]).float() * s._scale_inv
        return values.t() if turned else values
    if s.kind == "mxfp8":
        data, scale = s._rowwise_data, s._rowwise_scale_inv
        if turned:
            data, scale = s._columnwise_data.t(), s._columnwise_scale_inv.t()
        scale = scale.contiguous().view(torch.float8_e8m0fnu).float()
        values = data.contiguous().view(_TYPES[s.codes]).float()
        return values * scale.repeat_interleave(32, 1)[: values.shape[0], : values.shape[1]]
    assert not turned  # blocks and NVFP4: its kernels read rows alone
    data, scale = s._rowwise_data, s._rowwise_scale_inv
    if s.kind == "blocks":
        scale = scale.repeat_interleave(128, 0) if s.tiles else scale.t()
        scale = scale.repeat_interleave(128, 1)[: data.shape[0], : data.shape[1]]
        return data.view(_TYPES[s.codes]).float() * scale
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack((data & 15, data >> 4), -1).flatten(-2).long()
    values = grid[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    scale = scale.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    return values * scale[: values.shape[0], : values.shape[1]] * s._amax_rowwise / 2688


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in under the package's names, with a generator where CUDA's would be."""
    here = sys.modules[__name__]
    names = [name for name in vars(here) if name.endswith("Quantizer") and name[0] != "_"]
    storage = {
        "Float8TensorStorage": _tensor_storage,
        "Float8BlockwiseQTensorStorage": _block_storage,
        "MXFP8TensorStorage": _mxfp8_storage,
        "NVFP4TensorStorage": _nvfp4_storage,
    }
    parts: dict[str, dict[str, Any]] = {
        "transformer_engine_torch": {"DType": CODES, "compute_amax": compute_amax},
        "transformer_engine": {},
        "transformer_engine.pytorch": {name: getattr(here, name) for name in names},
        "transformer_engine.pytorch.cpp_extensions": {"general_gemm": general_gemm},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.storage": storage,
    }
    for name, fields in parts.items():
        module = ModuleType(name)
        module.__dict__.update(fields)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator().manual_seed(5),))
