"""Transformer Engine's quantizers against ours, bit for bit, and its modules against ours in a step.

Needs the package and a GPU: ``pytest tests/gpu/test_transformer_engine.py``. It has not been run by us; names
are those of Transformer Engine 2.7 and later, read in its own tests.
"""

from __future__ import annotations

import pytest
import torch
from started import losses_alone

from fp4pretrain.numerics import QuantSpec, quantize
from fp4pretrain.nvidia import why_no_engine

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(why_no_engine() is not None, reason=f"no {why_no_engine()}"),
]
# FP4 and MXFP8 casts of Transformer Engine are kernels for Blackwell alone
NEEDS_BLACKWELL = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0),
    reason="Transformer Engine's kernels for this format need Blackwell",
)
SHAPE = (256, 512)  # padded by neither
ENGINE_RUN = (
    "model=tiny data=mock train.steps=9 train.micro_batch=2 train.global_batch=2 parallel.device=cuda "
    "train.eval_bf16=false optim.warmup=0 optim.decay=0.2"
).split()


def _tensor() -> torch.Tensor:
    """BF16 with outliers and an all-zero block."""
    x = torch.randn(SHAPE, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    x[:, 7] *= 100
    x[5, :32] = 0
    return x.bfloat16()


def _equal(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    theirs, ours = theirs.view(torch.uint8), ours.view(torch.uint8)
    assert theirs.shape == ours.shape, name
    wrong = (theirs != ours).nonzero()
    assert not len(wrong), (
        f"{name}: {len(wrong)} of {ours.numel()} bytes differ, first at {wrong[0].tolist()}: theirs "
        f"{int(theirs[tuple(wrong[0])])}, ours {int(ours[tuple(wrong[0])])}"
    )


@pytest.mark.parametrize("format_", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_current_scaling(format_: str) -> None:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer

    x = _tensor()
    kind = {"fp8_e4m3": tex.DType.kFloat8E4M3, "fp8_e5m2": tex.DType.kFloat8E5M2}[format_]
    theirs = Float8CurrentScalingQuantizer(fp8_dtype=kind, device=x.device)(x)
    ours = quantize(x, QuantSpec(format_, block="tensor"))
    _equal("codes", theirs._data, ours.codes)


@NEEDS_BLACKWELL
def test_mxfp8() -> None:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import MXFP8Quantizer

    x = _tensor()
    quantizer = MXFP8Quantizer(fp8_dtype=tex.DType.kFloat8E4M3, rowwise=True, columnwise=False)
    theirs = quantizer(x)
    ours = quantize(x, QuantSpec("mxfp8", block="1d", scale="rceil"))
    assert ours.scales is not None
    rows, blocks = ours.scales.shape
    _equal("scales", theirs._rowwise_scale_inv[:rows, :blocks].contiguous(), ours.scales)
    _equal("codes", theirs._rowwise_data, ours.codes)


@NEEDS_BLACKWELL
@pytest.mark.parametrize("block", ["1d", "2d"])
def test_nvfp4(block: str) -> None:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import NVFP4Quantizer

    x = _tensor()
    theirs = NVFP4Quantizer(
        fp4_dtype=tex.DType.kFloat4E2M1,
        rowwise=True,
        columnwise=False,
        with_amax_reduction=False,
        amax_reduction_group=None,
        with_rht=False,
        with_post_rht_amax=False,
        with_2d_quantization=block == "2d",
    )(x)
    ours = quantize(x, QuantSpec("nvfp4", block=block))
    assert ours.scales is not None
    scales = ours.scales.view(torch.uint8)
    if block == "2d":  # a row of theirs for each of the tile's 16
        scales = scales.repeat_interleave(16, dim=0)
    rows, blocks = scales.shape
    _equal("scales", theirs._rowwise_scale_inv[:rows, :blocks].contiguous(), scales)
    _equal("codes", theirs._rowwise_data, ours.codes)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16", 5e-3), ("fp8", 2e-2), ("fp8_delayed", 5e-2)]
)
def test_a_step_of_its_modules_is_a_step_of_ours(precision: str, tolerance: float) -> None:
    """The same initial weights: three losses within what the order of sums, and FP8's two ways of
    holding sums, make of them."""
    ours, theirs = (
        losses_alone(
            [*ENGINE_RUN, f"precision={precision}", f"model.implementation={name}"], steps=3
        )
        for name in ("fp4pretrain", "transformer_engine")
    )
    assert all(abs(a / b - 1) < tolerance for a, b in zip(theirs, ours, strict=True)), (
        ours,
        theirs,
    )
