"""Laws of nearest rounding, on whatever tensor hypothesis finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pretrain.numerics import Noise, QuantSpec, emulate, quantize, tensor_amax
from fp4pretrain.numerics.blocks import block_amax
from fp4pretrain.numerics.formats import E2M1
from fp4pretrain.numerics.rounding import decode, encode

MX = [
    QuantSpec(f, b, scale=s)
    for f in ("mxfp4", "mxfp8")
    for b in ("1d", "2d")
    for s in ("floor", "ceil", "even", "rceil")
]
NEAREST = [
    *MX,
    *(QuantSpec("nvfp4", b, ties=t, scale=s) for b in ("1d", "2d") for t in ("even", "away")
      for s in ("default", "cap256", "unbiased", "four_over_six")),
    *(QuantSpec("fp8_e4m3", b) for b in ("tensor", "row", "1d", "2d")),
    QuantSpec("fp8_e5m2"),
    QuantSpec("bf16"),
]  # fmt: skip

laws = settings(max_examples=12, deadline=None)


@st.composite
def tensors(draw, rows: int = 32, cols: int = 64) -> torch.Tensor:
    """Gaussian under log-normal block scales, with zeros, outliers and coarse values (ties)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, cols, generator=generator)
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))
    x *= torch.exp(spread * torch.randn(rows, cols // 16, generator=generator)).repeat_interleave(
        16, 1
    )
    if draw(st.booleans()):
        x = (x * 4).round() / 4
    x *= (
        torch.rand(rows, cols, generator=generator) > draw(st.sampled_from([0.0, 0.5, 0.95]))
    ).float()
    return x * 10.0 ** draw(st.integers(-8, 8))


@pytest.mark.parametrize("spec", NEAREST, ids=str)
@laws
@given(x=tensors(rows=128, cols=128))
def test_the_sign_is_carried_through(spec: QuantSpec, x: torch.Tensor) -> None:
    assert torch.equal(emulate(-x, spec)[0], -emulate(x, spec)[0])


@pytest.mark.parametrize("spec", MX, ids=str)
@laws
@given(x=tensors(), power=st.integers(-20, 20))
def test_mx_moves_with_a_power_of_two(spec: QuantSpec, x: torch.Tensor, power: int) -> None:
    scaled = quantize(x * 2.0**power, spec)
    assert torch.equal(scaled.dequantize(), quantize(x, spec).dequantize() * 2.0**power)


@pytest.mark.parametrize("scale", ["floor", "even", "rceil"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
@laws
@given(x=tensors())
def test_mx_casts_once(name: str, scale: str, x: torch.Tensor) -> None:
    """What is on the grid stays (``ceil`` may pick a larger scale for a maximum that grew to 6)."""
    once = quantize(x, QuantSpec(name, scale=scale)).dequantize()
    assert torch.equal(quantize(once, QuantSpec(name, scale=scale)).dequantize(), once)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@laws
@given(x=tensors())
def test_power_of_two_fp8_casts_once(name: str, x: torch.Tensor) -> None:
    spec = QuantSpec(name, "row", scale="pow2")
    once = quantize(x, spec).dequantize()
    assert torch.equal(quantize(once, spec).dequantize(), once)


@laws
@given(x=tensors())
def test_nvfp4_casts_once_where_scales_are_exact(x: torch.Tensor) -> None:
    """Under amax 2688 (S_enc 1) a tile whose maximum is 6 keeps its scale, so its codes stay."""
    x = x / tensor_amax(x).clamp(min=1e-30) * 6.0
    x[:, ::16] = 6.0
    amax = torch.tensor(2688.0)
    once = quantize(x, QuantSpec("nvfp4"), amax=amax).dequantize()
    assert torch.equal(quantize(once, QuantSpec("nvfp4"), amax=amax).dequantize(), once)


@pytest.mark.parametrize("spec", [s for s in NEAREST if s.block in ("1d", "2d")], ids=str)
@laws
@given(x=tensors(rows=256, cols=256), data=st.data())
def test_blocks_are_independent(spec: QuantSpec, x: torch.Tensor, data: st.DataObject) -> None:
    """Changing one block changes nothing else (the tensor's amax being given)."""
    block_rows, block_cols = spec.block_shape((256, 256))
    row = data.draw(st.integers(0, 256 // block_rows - 1)) * block_rows
    col = data.draw(st.integers(0, 256 // block_cols - 1)) * block_cols
    amax = tensor_amax(x) * 2
    changed = x.clone()
    changed[row : row + block_rows, col : col + block_cols] *= -1.7
    before, after = emulate(x, spec, amax=amax)[0], emulate(changed, spec, amax=amax)[0]
    after[row : row + block_rows, col : col + block_cols] = 0
    before[row : row + block_rows, col : col + block_cols] = 0
    assert torch.equal(before, after)


@pytest.mark.parametrize("scale", ["ceil", "rceil"])
@laws
@given(x=tensors())
def test_mx_is_within_half_a_step(scale: str, x: torch.Tensor) -> None:
    """Rules that never clip: |error| is at most half the gap, .25 / .5 / 1 below 2 / 4 / 6."""
    q = quantize(x, QuantSpec("mxfp4", scale=scale))
    unit = q.scales.float().repeat_interleave(32, 1)
    scaled, error = x.abs() / unit, (q.dequantize() - x).abs() / unit
    half = torch.where(scaled < 2, 0.25, torch.where(scaled < 4, 0.5, 1.0))
    assert (error <= half).all() and (scaled <= 6).all()


@laws
@given(x=tensors())
def test_unbiased_nvfp4_never_clips_where_scales_are_normal(x: torch.Tensor) -> None:
    """Scales below E4M3's normal range round coarsely and may clip; all others leave room."""
    q = quantize(x, QuantSpec("nvfp4", scale="unbiased"))
    unit = q.scales.float().repeat_interleave(16, 1) * q.alpha()
    normal = q.scales.float().repeat_interleave(16, 1) >= 2.0**-6
    assert (x.abs()[normal] <= 6 * unit[normal] * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
@laws
@given(w=tensors(rows=64, cols=96))
def test_a_weight_and_its_transpose_share_codes(name: str, w: torch.Tensor) -> None:
    spec = QuantSpec(name, "2d")
    q, q_t = quantize(w, spec), quantize(w.t(), spec)
    assert torch.equal(q.scales.view(torch.uint8).t(), q_t.scales.view(torch.uint8))
    assert torch.equal(q.dequantize().t(), q_t.dequantize())


@given(packed=st.lists(st.integers(0, 255), min_size=1, max_size=64))
def test_codes_survive_packing(packed: list[int]) -> None:
    codes = torch.tensor([packed], dtype=torch.uint8)
    assert torch.equal(encode(decode(codes, E2M1), E2M1), codes)


@laws
@given(x=tensors(rows=160, cols=576))
def test_a_transposed_view_is_its_copy(x: torch.Tensor) -> None:
    spec = QuantSpec("nvfp4")
    assert torch.equal(emulate(x.t(), spec)[0], emulate(x.t().contiguous(), spec)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, 16), (16, 16), (1, 192), (32, 32)])
def test_block_amax_is_the_largest_magnitude(dtype: torch.dtype, block: tuple[int, int]) -> None:
    x = torch.randn(1600, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiles = x.float().abs().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    assert torch.equal(block_amax(x, block), tiles.amax((1, 3)))
    assert tensor_amax(x) == x.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_amax_puts_nan_over_inf_over_finite(dtype: torch.dtype) -> None:
    x = torch.ones(4, 4, dtype=dtype)
    x[1, 1] = -torch.inf
    assert tensor_amax(x) == torch.inf and tensor_amax(x).dtype == torch.float32
    x[2, 2] = torch.nan
    assert tensor_amax(x).isnan()


@pytest.mark.parametrize(
    "spec, expected",
    [
        (QuantSpec("nvfp4"), 9.0e-3),
        (QuantSpec("nvfp4", scale="four_over_six"), 7.6e-3),
        (QuantSpec("nvfp4", "2d", scale="cap256"), 12.4e-3),
        (QuantSpec("nvfp4", scale="unbiased", rounding="stochastic"), 23.5e-3),
    ],
    ids=str,
)
def test_error_on_a_gaussian_is_the_published_one(spec: QuantSpec, expected: float) -> None:
    """Quartet II's table (2601.22813), two digits there, so 1%; a million draws give 0.3%."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    values, alpha = emulate(x, spec, noise=Noise(1))
    assert (values * alpha - x).square().mean().item() == pytest.approx(expected, rel=0.01)
