"""A QuantSpec that exists can be computed; one that makes no sense names the key and the cure."""

from __future__ import annotations

import pytest
import torch

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import (
    FORMATS,
    Noise,
    QuantSpec,
    emulate,
    every_spec,
    gemm_reference,
    quantize,
)


@pytest.mark.parametrize(
    "fields, key",
    [
        ({"format": "fp5"}, "format"),
        ({"format": "nvfp4", "block": "row"}, "block"),
        ({"format": "bf16", "block": "1d"}, "block"),
        ({"format": "mxfp4", "scale": "cap256"}, "scale"),
        ({"format": "nvfp4", "scale": "rceil"}, "scale"),
        ({"format": "mxfp8", "scale": "unbiased"}, "scale"),
        ({"format": "nvfp4", "rounding": "random"}, "rounding"),
        ({"format": "mxfp8", "rounding": "stochastic"}, "rounding"),
        ({"format": "bf16", "rounding": "stochastic"}, "rounding"),
        ({"format": "fp8_e4m3", "ties": "away"}, "ties"),
        ({"format": "nvfp4", "ties": "odd"}, "ties"),
        ({"format": "nvfp4", "scale": "four_over_six", "rounding": "stochastic"}, "scale"),
        ({"format": "nvfp4", "rounding": "eden", "scale": "cap256"}, "rounding"),
        ({"format": "nvfp4", "scale": "eden"}, "rounding"),
        ({"format": "nvfp4", "rounding": "eden", "block": "2d"}, "rounding"),
        ({"format": "mxfp4", "rounding": "eden"}, "rounding"),
        ({"format": "nvfp4", "source": "backward"}, "source"),
        ({"format": "bf16", "source": "forward"}, "source"),
        ({"format": "nvfp4", "split": "half"}, "split"),
        ({"format": "bf16", "split": "mean"}, "split"),
        ({"format": "nvfp4", "split": "channels", "channels": 0.0}, "channels"),
        ({"format": "mxfp4", "amax": "held"}, "amax"),
        ({"format": "fp8_e4m3", "block": "row", "amax": "delayed"}, "amax"),
        ({"format": "nvfp4", "amax": "fixed", "amax_value": -1.0}, "amax_value"),
        ({"format": "nvfp4", "amax": "held", "amax_steps": 0}, "amax_steps"),
    ],
)
def test_a_wrong_field_is_named_with_its_cure(fields: dict, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: .*; ?use |^{key}: .*use "):
        QuantSpec(**fields)


def test_default_means_the_same_as_its_name() -> None:
    assert QuantSpec("nvfp4") == QuantSpec("nvfp4", block="1d", scale="default")
    assert QuantSpec("mxfp4") == QuantSpec("mxfp4", block="1d", scale="floor")
    assert QuantSpec("fp8_e4m3") == QuantSpec("fp8_e4m3", block="tensor")
    assert len({QuantSpec("mxfp4"), QuantSpec("mxfp4", scale="floor")}) == 1


@pytest.mark.parametrize(
    "spec, shape",
    [
        (QuantSpec("nvfp4"), (4, 24)),
        (QuantSpec("nvfp4", "2d"), (24, 32)),
        (QuantSpec("mxfp4"), (4, 48)),
        (QuantSpec("mxfp8", "2d"), (16, 32)),
        (QuantSpec("fp8_e4m3", "1d"), (4, 192)),
        (QuantSpec("fp8_e5m2", "2d"), (64, 128)),
    ],
    ids=str,
)
def test_what_blocks_do_not_divide_is_cast_as_a_part_of_the_matrix_padded_with_zeros(
    spec: QuantSpec, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows, cols = spec.padded_shape(shape)
    assert (rows, cols) != shape
    longer = torch.zeros(rows, cols)
    longer[: shape[0], : shape[1]] = x
    whole, part = quantize(longer, spec), quantize(x, spec)
    assert part.shape == shape
    assert torch.equal(part.dequantize(), whole.dequantize()[: shape[0], : shape[1]])
    assert torch.equal(part.codes.view(torch.uint8), whole.codes.view(torch.uint8)[: shape[0]])
    values, alpha = emulate(x, spec)
    assert torch.equal(values * alpha, part.dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 64), (32, 0), (0, 0)])
def test_a_matrix_without_elements_has_a_cast_without_elements(
    name: str, shape: tuple[int, int]
) -> None:
    x = torch.empty(shape)
    for block in FORMATS[name].blocks:
        spec = QuantSpec(name, block)
        q, (values, alpha) = quantize(x, spec), emulate(x, spec)
        assert q.dequantize().shape == values.shape == (values * alpha).shape == shape
        other = quantize(torch.ones(16, shape[1]), spec)
        assert torch.equal(gemm_reference(q, other), torch.zeros(shape[0], 16))


def test_stochastic_rounding_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        emulate(torch.ones(1, 16), QuantSpec("nvfp4", rounding="stochastic"))


@pytest.mark.parametrize("spec", every_spec(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulate_is_dequantize_bit_for_bit(spec: QuantSpec, dtype: torch.dtype) -> None:
    """And values are exact in bfloat16 wherever the spec says so; the layout is design.md's."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.01
    x[:, 32:64] *= 1e-6
    x[3, 5], x[3, 6], x[7] = 40.0, -0.0, 0.0
    x = x.to(dtype)
    noise = Noise(11, 5, 32)
    q = quantize(x, spec, noise=noise)
    values, alpha = emulate(x, spec, noise=noise)
    assert values.dtype == alpha.dtype == torch.float32
    assert alpha.shape == ((256, 1) if spec.amax_span == "row" else ())
    assert values.shape == x.shape and values.is_contiguous()
    assert torch.equal((values * alpha).view(torch.int32), q.dequantize().view(torch.int32))
    assert torch.equal(q.alpha(), alpha)
    assert torch.equal(values.bfloat16().float(), values) or not spec.exact_in_bf16
    assert (q.amax is not None) == (spec.amax_span == "tensor" or len(spec.row.levels) > 1)
    element = spec.row.element
    assert q.codes.dtype == element.dtype
    assert q.codes.shape == (256, 256 // (2 if element.packed else 1))
    if q.scales is not None:
        block = spec.block_shape((256, 256))
        assert q.scales.shape == (256 // block[0], 256 // block[1])
        dtypes = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}
        dtypes |= {"ue5m3": torch.uint8, "fp32": torch.float32}
        assert q.scales.dtype == dtypes[spec.row.scale_type]


@pytest.mark.parametrize("spec", [s for s in every_spec() if not s.stochastic], ids=str)
def test_bfloat16_input_is_its_fp32_copy(spec: QuantSpec) -> None:
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert torch.equal(emulate(x, spec)[0], emulate(x.float(), spec)[0])


@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3", "fp8_e5m2"])
def test_a_given_amax_replaces_the_tensors_own(name: str) -> None:
    """A shard under the whole tensor's amax is that shard of the whole tensor's cast."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    x[60, 60] = 9.0
    spec = QuantSpec(name)
    whole = quantize(x, spec)
    shard = quantize(x[:32], spec, amax=whole.amax)
    assert torch.equal(shard.codes.view(torch.uint8), whole.codes.view(torch.uint8)[:32])
    assert torch.equal(shard.dequantize(), whole.dequantize()[:32])
    assert shard.amax == 9.0
    assert not torch.equal(quantize(x[:32], spec).dequantize(), shard.dequantize())
