"""A GPU computes the same bits as a CPU: no fused or approximate arithmetic slips in."""

from __future__ import annotations

import pytest
import torch

from fp4pretrain.numerics import (
    FORMATS,
    Noise,
    QuantSpec,
    emulate,
    every_spec,
    gemm_reference,
    quantize,
    rotate,
    saturation_fraction,
    tensor_amax,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def matrix(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(256, 512, generator=generator)
    x *= torch.exp(4 * torch.randn(256, 32, generator=generator)).repeat_interleave(16, 1)
    x[0], x[1, :40], x[2, 3] = 0.0, 1e-40, -0.0
    return x.to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FORMATS))
def test_same_bits_on_both_devices(name: str, dtype: torch.dtype) -> None:
    x, noise = matrix(dtype), Noise(4, 1, 16)
    for spec in every_spec():
        if spec.format != name:
            continue
        q, q_gpu = quantize(x, spec, noise=noise), quantize(x.cuda(), spec, noise=noise)
        assert torch.equal(bits(q.codes), bits(q_gpu.codes)), spec
        assert q.scales is None or torch.equal(bits(q.scales), bits(q_gpu.scales)), spec
        assert torch.equal(bits(q.dequantize()), bits(q_gpu.dequantize())), spec
        values, alpha = emulate(x.cuda(), spec, noise=noise)
        assert torch.equal(bits(values * alpha), bits(q.dequantize())), spec
        assert torch.equal(saturation_fraction(x, spec), saturation_fraction(x.cuda(), spec).cpu())
        assert gemm_reference(q_gpu, q_gpu).is_cuda


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", list(FORMATS))
def test_nonfinite_input_on_both_devices(name: str, bad: float) -> None:
    x = matrix(torch.float32)
    x[7, 100] = bad
    values, alpha = emulate(x, QuantSpec(name))
    values_gpu, alpha_gpu = emulate(x.cuda(), QuantSpec(name))
    assert torch.equal((values * alpha).isfinite(), (values_gpu * alpha_gpu).isfinite().cpu())
    assert torch.equal(tensor_amax(x).isnan(), tensor_amax(x.cuda()).isnan().cpu())


@pytest.mark.parametrize("size", [16, 128])
def test_rotation_on_both_devices(size: int) -> None:
    x = matrix(torch.float32)
    assert torch.equal(rotate(x, size=size), rotate(x.cuda(), size=size).cpu())
