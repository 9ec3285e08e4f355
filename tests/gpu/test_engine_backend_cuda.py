"""precision.backend=transformer_engine on a GPU, with the package: its casts beside the reference's and its
products beside the Triton backend's, bit for bit; and the losses of a run on both.

MXFP8's and NVFP4's kernels need a Blackwell and have not been run by us; its reference of NVFP4 in Python
needs none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from started import losses_alone
from torch import Tensor

from fp4pretrain.bench.linear import casts_of
from fp4pretrain.config import compose, plan_of
from fp4pretrain.numerics import QuantSpec, quantize, rotate, signs_te
from fp4pretrain.nvidia import why_no_engine
from fp4pretrain.ops import Cast, choose
from fp4pretrain.ops.engine_backend import EngineBackend
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.ops.triton_backend import TritonBackend
from fp4pretrain.precision import OPERANDS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(why_no_engine() is not None, reason=f"no {why_no_engine()}"),
]
# Transformer Engine's MXFP8 and NVFP4 kernels are compiled for Blackwell's tensor cores alone: on any other
# GPU there is nothing to run.
NEEDS_BLACKWELL = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0),
    reason="Transformer Engine's kernels for this format need Blackwell",
)
PRODUCTS = ("bf16", "fp8", "fp8_delayed", "fp8_block", pytest.param("mxfp8", marks=NEEDS_BLACKWELL))
RECIPES = (*PRODUCTS, pytest.param("nvfp4", marks=NEEDS_BLACKWELL))
SHAPES = [(512, 256, 384), (200, 136, 72)]  # whole blocks of 128; padded
RUN = (
    "model=tiny data=mock train.steps=9 train.micro_batch=2 train.global_batch=2 parallel.device=cuda "
    "optim.warmup=0 optim.decay=0.2 train.graph=never"
).split()


def _tensors(t: int, k: int, n: int) -> dict[str, Tensor]:
    g = torch.Generator("cuda").manual_seed(3)
    made = {}
    for name, shape in (("x", (t, k)), ("w", (n, k)), ("dy", (t, n))):
        made[name] = torch.randn(shape, device="cuda", generator=g)
        made[name][:, ::29] *= 20
    return {name: x.bfloat16() for name, x in made.items()}


def _plan(name: str) -> Any:
    return plan_of(compose(["model=tiny", f"precision={name}"]))


def _made(backend: Any, name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    casts = casts_of(_plan(name).recipe)
    made = {}
    for tensor, x in _tensors(*shape).items():
        both = {where: c for where, c in casts.items() if where.endswith(f".{tensor}")}
        asked = any(c.asks for c in both.values())
        found = backend.quantize(
            x, list(both.values()), (lambda amaxes: [a * 1.75 for a in amaxes]) if asked else None
        )
        made |= dict(zip(both, found, strict=True))
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_the_backend_is_taken_where_it_is_named(name: str) -> None:
    """So its own check of casts and products has passed."""
    chosen, why = choose("transformer_engine", _plan(name), torch.device("cuda"))
    assert chosen.name == "transformer_engine" and "Transformer Engine" in why


@pytest.mark.parametrize("scale", ["default", "four_over_six"])
@pytest.mark.parametrize("block", ["1d", "2d"])
def test_its_own_reference_of_nvfp4_is_ours_bit_for_bit(block: str, scale: str) -> None:
    """Codes, scales and amaxes of a matrix, and of its transpose under its rotation. Any GPU will do."""
    from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import NVFP4QuantizerRef
    from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats

    rotated = block == "1d" and scale == "default"
    quantizer = NVFP4QuantizerRef(
        dtype=Fp4Formats.E2M1,
        quant_tile_shape=(16, 16) if block == "2d" else (1, 16),
        with_rht=rotated,
        nvfp4_use_4over6=scale == "four_over_six",
        nvfp4_e4m3_max=256,
        nvfp4_4over6_err_mode="MSE",
    )
    x = _tensors(512, 384, 64)["x"]
    codes, scales, codes_t, scales_t, amax, amax_t = quantizer._quantize(x)
    turned = x.t().contiguous()
    if rotated:
        signs = torch.tensor(signs_te(), dtype=torch.float32, device="cuda")
        turned = rotate(turned, size=16, signs=signs, round_bf16=True)
    spec = QuantSpec("nvfp4", block, "nearest", scale=scale)
    for y, found in ((x, (codes, scales, amax)), (turned, (codes_t, scales_t, amax_t))):
        ours = quantize(y, spec)
        tall = y.shape[0] // ours.scales.shape[0]  # its tiles' scales stand in every row
        blocks = ours.scales.view(torch.uint8).repeat_interleave(tall, 0)
        same = blocks == found[1].view(torch.uint8)
        # Four Over Six: where both errors are the same number but for the order of their sums, either may win
        assert same.double().mean() >= (1.0 if scale == "default" else 0.999)
        assert (ours.codes == found[0])[same.repeat_interleave(8, 1)].all()
        assert torch.equal(ours.amax.reshape(1), found[2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_its_casts_are_the_reference_s_bit_for_bit(name: str, shape: tuple[int, int, int]) -> None:
    mine, ours = (_made(b, name, shape) for b in (EngineBackend(), ReferenceBackend()))
    casts = casts_of(_plan(name).recipe)
    for where, operand in mine.items():
        theirs, want = operand.dequantize(), ours[where].dequantize()
        cols = min(theirs.shape[1], want.shape[1])
        assert not theirs[:, cols:].any()
        if not casts[where].spec.stochastic:
            wrong = int((theirs[:, :cols] != want[:, :cols]).sum())
            assert not wrong, f"{where}: {wrong} of {want.numel()} differ"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_its_products_are_those_of_its_operands(name: str, shape: tuple[int, int, int]) -> None:
    """As far as the order of sums allows: Hopper's FP8 cores keep 13 bits at each addition of 32 products,
    and once more where the sum leaves them."""
    recipe, backend = _plan(name).recipe, EngineBackend()
    made = _made(backend, name, shape)
    for gemm, operands in OPERANDS.items():
        a, b = (made[f"{gemm}.{operand}"] for operand in operands)
        av, bv = a.dequantize().double(), b.dequantize().double()
        additions = -(-a.shape[1] // 32) + 1
        want, limit = av @ bv.t(), av.abs() @ bv.abs().t() * additions * 2.0**-12
        fast = recipe.gemm(gemm).fast_accum
        got = backend.gemm(a, b, out_dtype=torch.bfloat16, fast_accum=fast).double()
        assert ((got - want).abs() <= limit + want.abs() * 2.0**-8).all(), gemm
        main = torch.ones_like(want, dtype=torch.float32)
        added = backend.gemm(a, b, out_dtype=torch.float32, accumulate_into=main, fast_accum=fast)
        assert added is main
        assert ((added.double() - want - 1).abs() <= limit + (want.abs() + 1) * 2.0**-23).all()


@pytest.mark.parametrize("gemm", OPERANDS)
@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_delayed", "fp8_block"])
def test_its_products_are_the_triton_backend_s_bit_for_bit(name: str, gemm: str) -> None:
    """Both go to cuBLASLt, with equal operands of whole blocks."""
    fast = _plan(name).recipe.gemm(gemm).fast_accum
    products = []
    for backend in (EngineBackend(), TritonBackend()):
        made = _made(backend, name, (2048, 1024, 1536))
        a, b = (made[f"{gemm}.{operand}"] for operand in OPERANDS[gemm])
        products.append(backend.gemm(a, b, out_dtype=torch.bfloat16, fast_accum=fast))
    wrong = int((products[0] != products[1]).sum())
    far = float((products[0].double() - products[1].double()).norm() / products[1].double().norm())
    assert not wrong, f"{wrong} of {products[0].numel()} differ, by {far:.2e} of the norm"


def test_an_infinite_element_is_saturated_where_ours_is_not_a_number() -> None:
    """What the documentation says of the two; a NaN stays one in both."""
    cast = [Cast(QuantSpec("fp8_e4m3", "tensor"))]
    x = _tensors(64, 64, 64)["x"]
    x[3, 4] = float("inf")
    theirs, ours = (
        b.quantize(x, cast)[0].dequantize() for b in (EngineBackend(), ReferenceBackend())
    )
    assert theirs[3, 4] == 448 and theirs.isfinite().all() and ours.isnan().all()
    x[3, 4] = float("nan")
    theirs = EngineBackend().quantize(x, cast)[0].dequantize()
    assert theirs[3, 4].isnan()


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("bf16", 1e-3), ("fp8", 1e-3), ("fp8_delayed", 1e-3), ("fp8_block", 1e-3)],
)
def test_a_run_on_it_has_the_losses_of_a_run_on_ours(precision: str, tolerance: float) -> None:
    ours, theirs = (
        losses_alone([*RUN, f"precision={precision}", f"precision.backend={name}"], steps=4)
        for name in ("triton", "transformer_engine")
    )
    assert all(abs(a / b - 1) < tolerance for a, b in zip(theirs, ours, strict=True)), (
        ours,
        theirs,
    )
