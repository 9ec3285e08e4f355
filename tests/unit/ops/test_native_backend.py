"""The native backend without its GPU: the layout of scales, the arithmetic around the instruction, refusals.

Where a product is needed, a model of the hardware stands in for torch's ``scaled_mm``: it reads codes and
swizzled scales as the tensor cores do, and multiplies in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fp4_kernels import scaled_mm
from torch import Tensor

from fp4pretrain.numerics import QuantSpec, gemm_reference, quantize
from fp4pretrain.ops import native_backend, selfcheck
from fp4pretrain.ops.native_backend import NativeBackend
from fp4pretrain.ops.triton_operand import TritonOperand
from fp4pretrain.precision import Fprop

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Self-checks are kept a process; each test makes its own."""
    selfcheck.native_path.cache_clear()
    yield
    selfcheck.native_path.cache_clear()


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (160, 6), (1, 1), (129, 5)])
def test_scales_lie_where_the_cublas_documentation_says(shape: tuple[int, int]) -> None:
    rows, blocks = shape
    scales = torch.randint(1, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    flat = scaled_mm.swizzle(scales).view(torch.uint8)
    wide = -(-blocks // 4)
    assert flat.numel() == -(-rows // 128) * wide * 512
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    place = (r // 128 * wide + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    assert torch.equal(flat[place], scales.view(torch.uint8))
    assert int((flat != 0).sum()) == rows * blocks  # the padding is zeros
    back = scaled_mm.unswizzle(flat.view(scales.dtype), shape)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def decoded(codes: Tensor, flat: Tensor) -> Tensor:
    """float64 element x block scale [rows, k] of codes and swizzled scales."""
    values = codes.double()
    if codes.dtype == torch.uint8:
        values = E2M1.double()[torch.stack((codes & 15, codes >> 4), dim=-1).long()].flatten(1)
    block = 16 if flat.dtype == torch.float8_e4m3fn else 32
    scales = scaled_mm.unswizzle(flat, (values.shape[0], values.shape[1] // block))
    return values * scales.double().repeat_interleave(block, dim=1)


def hardware(a: Any, b: Any, *, out_dtype: torch.dtype, alphas: Any = None) -> Tensor:
    """``scaled_matmul`` as Blackwell computes it."""
    product = decoded(*a) @ decoded(*b).t()
    return (product * (1 if alphas is None else alphas[0] * alphas[1])).to(out_dtype)


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B200 whose torch multiplies by ``hardware``."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA B200")
    monkeypatch.setattr(scaled_mm, "why_missing", lambda _: None)
    for module in (scaled_mm, native_backend):
        monkeypatch.setattr(module, "scaled_matmul", hardware)


PAIRS = {
    "nvfp4": (QuantSpec("nvfp4"), QuantSpec("nvfp4")),
    "nvfp4, 2d weights": (QuantSpec("nvfp4"), QuantSpec("nvfp4", "2d")),
    "mxfp4, 2d weights": (QuantSpec("mxfp4"), QuantSpec("mxfp4", "2d")),
    "mxfp4 unbiased": (QuantSpec("mxfp4", scale="unbiased"), QuantSpec("mxfp4", scale="floor")),
    "mxfp8": (QuantSpec("mxfp8", scale="rceil"), QuantSpec("mxfp8", scale="rceil")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_native_gemm_is_the_reference_s(blackwell: None, name: str) -> None:
    g = torch.Generator().manual_seed(1)
    sides = []
    for rows, spec in zip((160, 96), PAIRS[name], strict=True):
        q = quantize(torch.randn(rows, 128, generator=g) * torch.arange(1, rows + 1)[:, None], spec)
        alpha = q.alpha() if q.amax is not None or spec.scale == "unbiased" else None
        sides.append((q, TritonOperand(q.codes, q.shape, alpha, scales=q.scales)))
    (qa, a), (qb, b) = sides
    want = gemm_reference(qa, qb, accumulate=torch.float64).double()
    backend = NativeBackend()
    close = dict(rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    single = backend.gemm(a, b, out_dtype=torch.float32)
    torch.testing.assert_close(single.double(), want, **close)
    half = backend.gemm(a, b, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), want, rtol=2.0**-8, atol=close["atol"])
    main = torch.full_like(single, 3.0)
    added = backend.gemm(a, b, out_dtype=torch.float32, accumulate_into=main)
    assert added is main
    torch.testing.assert_close(main.double(), want + 3, **close)


@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4", "mxfp8"])
def test_scaled_mm_is_taken_where_its_self_check_passes(blackwell: None, format_: str) -> None:
    gemm = Fprop(QuantSpec(format_), QuantSpec(format_))
    # the self-check runs on the CPU: the device is only asked for its capability
    assert selfcheck.native_path(format_, CPU) == ("scaled_mm", "")
    assert NativeBackend().why_not(gemm, CPU) == "FP4 tensor cores are on GPUs, not on cpu"


def test_rows_taken_for_each_other_are_noticed_and_said(
    blackwell: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hardware that reads the scales in another layout, and a Triton that cannot compile."""
    swap = scaled_mm.swizzle

    def swapped(scales: Tensor) -> Tensor:
        return swap(scales.view(torch.uint8).roll(1, 0).view(scales.dtype))

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(scaled_mm, "swizzle", swapped)
    monkeypatch.setattr(selfcheck, "native_matmul", broken)
    path, reasons = selfcheck.native_path("nvfp4", CPU)
    assert path is None
    assert reasons == (
        "scaled_mm: its torch.float32 product of a self-check is not the reference's; "
        "dot_scaled: RuntimeError: no such instruction"
    )


def test_hopper_refuses_block_scaled_formats_and_says_who_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA H100")
    for format_ in ("nvfp4", "mxfp4", "mxfp8"):
        reason = NativeBackend().why_not(Fprop(QuantSpec(format_), QuantSpec(format_)), CUDA)
        assert reason is not None
        assert reason.startswith(f"NVIDIA H100 has no matrix instruction for {format_} (B200")
    mixed = NativeBackend().why_not(Fprop(QuantSpec("mxfp4"), QuantSpec("mxfp8")), CUDA)
    assert mixed == "mxfp4 and mxfp8 do not meet in one instruction"
