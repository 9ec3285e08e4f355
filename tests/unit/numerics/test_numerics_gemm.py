"""The reference GEMM against float64, and what the measures measure."""

from __future__ import annotations

import math

import pytest
import torch

from fp4pretrain.numerics import (
    QuantSpec,
    cosine,
    emulate,
    gemm_reference,
    quantize,
    relative_error,
    saturation_fraction,
    sqnr_db,
    underflow_fraction,
)

PAIRS = [("nvfp4", "1d", "2d"), ("nvfp4", "1d", "1d"), ("mxfp4", "1d", "2d"), ("mxfp8", "1d", "1d"),
         ("fp8_e4m3", "tensor", "tensor"), ("fp8_e4m3", "row", "row"), ("fp8_e4m3", "1d", "2d"),
         ("bf16", "default", "default")]  # fmt: skip


def operands(k: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(64, k, generator=generator) * 3e-5
    b = torch.randn(128, k, generator=generator) * 7.0
    a[3, 17], b[9, 100] = 0.02, -300.0
    return a, b


@pytest.mark.parametrize("name, block_a, block_b", PAIRS)
def test_product_of_the_dequantized(name: str, block_a: str, block_b: str) -> None:
    a, b = operands()
    q_a, q_b = quantize(a, QuantSpec(name, block_a)), quantize(b, QuantSpec(name, block_b))
    expected = q_a.dequantize(torch.float64) @ q_b.dequantize(torch.float64).t()
    for accumulate, limit in ((torch.float64, 3e-7), (torch.float32, 2e-6)):
        got = gemm_reference(q_a, q_b, accumulate=accumulate)
        assert got.shape == (64, 128) and got.dtype == torch.float32
        assert relative_error(expected, got) < limit
    got = gemm_reference(q_a, q_b, out_dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and relative_error(expected, got) < 2**-8


def test_the_tensor_scale_is_on_the_result() -> None:
    """values @ values.T is exact here (small integers), so alpha must be the only rounding."""
    a = torch.tensor([[6.0, 3.0] + [0.0] * 14])
    amax = torch.tensor(2688.0 / 3)
    q = quantize(a, QuantSpec("nvfp4"), amax=amax)
    alpha = q.alpha()
    assert gemm_reference(q, q).item() == (q.values().square().sum() * (alpha * alpha)).item()


def test_contraction_dimensions_must_agree() -> None:
    q_a, q_b = (quantize(torch.ones(2, k), QuantSpec("nvfp4")) for k in (16, 32))
    with pytest.raises(ValueError, match="contraction"):
        gemm_reference(q_a, q_b)


def test_a_better_format_loses_less() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    losses = []
    for name in ("bf16", "mxfp8", "nvfp4", "mxfp4"):
        values, alpha = emulate(x, QuantSpec(name))
        losses.append(sqnr_db(x, values * alpha).item())
    assert losses == sorted(losses, reverse=True)


def test_sqnr_and_relative_error() -> None:
    x = torch.tensor([3.0, 4.0])
    y = torch.tensor([3.0, 4.5])
    assert relative_error(x, y).item() == pytest.approx(0.1)
    assert sqnr_db(x, y).item() == pytest.approx(20.0)
    assert sqnr_db(x, x).item() == math.inf and relative_error(0 * x, 0 * x).item() == 0.0


def test_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosine(x, 5 * x).item() == pytest.approx(1.0)
    assert cosine(x, -x).item() == pytest.approx(-1.0)
    assert cosine(x, torch.tensor([[0.0, 1.0], [1.0, 0.0]])).item() == 0.0


def test_underflow_counts_what_became_zero() -> None:
    x = torch.tensor([1.0, 0.01, 0.0, -0.01, 2.0])
    assert underflow_fraction(x, torch.tensor([1.0, 0.0, 0.0, -0.0, 2.0])).item() == 0.5
    assert underflow_fraction(0 * x, 0 * x).item() == 0.0


def test_saturation_counts_what_is_clipped() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.0, 6.5, 6.0, -7.5])  # floor scale 1: three above 6
    assert saturation_fraction(x, QuantSpec("mxfp4")).item() == pytest.approx(3 / 32)
    assert saturation_fraction(x, QuantSpec("mxfp4", scale="rceil")).item() == 0.0
    assert saturation_fraction(x, QuantSpec()).item() == 0.0
    y = torch.zeros(1, 16)
    y[0, :2] = torch.tensor([6.375, 1.0])  # scale 17/16 ties down to 1
    assert saturation_fraction(y, QuantSpec("nvfp4"), amax=torch.tensor(2688.0)).item() == 1 / 16
