"""The Triton and native backends compute what the reference backend does: every operand, all three GEMMs."""

from __future__ import annotations

import pytest
import torch
from backend_laws import RECIPES, check_recipe, plain_values, sums_error
from fp4_kernels import cublaslt
from fp4_kernels.block_gemm import block_matmul
from gemm_laws import BLOCK_GEMMS, check_block_gemm

from fp4pretrain.bench.linear import casts_of
from fp4pretrain.numerics import QuantSpec, quantize
from fp4pretrain.ops import Cast
from fp4pretrain.ops.choice import refusals
from fp4pretrain.ops.native_backend import NativeBackend
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.ops.selfcheck import blocks_by_cublaslt
from fp4pretrain.ops.triton_backend import TritonBackend
from fp4pretrain.precision import Fprop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", list(RECIPES))
def test_it_computes_what_the_reference_does(name: str) -> None:
    reasons = refusals(TritonBackend(), [RECIPES[name]], torch.device("cuda", 0))
    if reasons:
        # A refusal is an answer, but on Hopper everything runs: a skip there would hide a loss.
        assert torch.cuda.get_device_capability() != (9, 0), reasons
        pytest.skip("; ".join(reasons))
    assert check_recipe(name) == []


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4 2d"])
def test_mxfp4_in_exact_bf16_too(name: str) -> None:
    assert check_recipe(name, backend=TritonBackend(mxfp4_emulation="bf16")) == []


@pytest.mark.parametrize("block", ["tensor", "row"])
def test_sums_keep_their_bits_unless_they_may_be_fast(block: str) -> None:
    """Products of one sign: a sum of 14 bits loses what is added late, the same way each time."""
    if torch.cuda.get_device_capability() != (9, 0):
        # Blackwell's add in FP32 whatever is asked for, and Ada's were never measured.
        pytest.skip("a law of Hopper's FP8 tensor cores")  # on (9, 0) it always runs
    spec = QuantSpec("fp8_e4m3", block)
    backend = TritonBackend()
    g = torch.Generator("cuda").manual_seed(4)
    a, b = (
        backend.quantize(torch.rand(n, 8192, device="cuda", generator=g).bfloat16(), [Cast(spec)])[
            0
        ]
        for n in (256, 384)
    )
    want = plain_values(a).double() @ plain_values(b).double().t()
    for v in (a.alpha, b.alpha):
        want = want if v is None else want * v
    errors = {
        fast: (backend.gemm(a, b, out_dtype=torch.float32, fast_accum=fast) / want - 1).abs()
        for fast in (False, True)
    }
    assert errors[False].max() <= 2.0**-10
    assert errors[True].min() > 2.0**-6


@pytest.mark.parametrize("k", [1024, 4096, 14336, 65536])
def test_what_fast_sums_cost(k: int) -> None:
    """Little where products have both signs, much where they have one: the table of docs/gpu.md."""
    if torch.cuda.get_device_capability() != (9, 0):
        # Blackwell's add in FP32 whatever is asked for, and Ada's were never measured.
        pytest.skip("a law of Hopper's FP8 tensor cores")  # on (9, 0) it always runs
    errors = {}
    for one_sign in (False, True):
        for fast in (False, True):
            how = dict(one_sign=one_sign, fast=fast)
            errors[one_sign, fast], casts = sums_error(TritonBackend(), k, **how)
            print(f"k {k}, {how}: sums {errors[one_sign, fast]:.1e}, casts {casts:.1e}")
    assert errors[False, False] < 2.0**-12
    assert errors[True, False] < 2.0**-10
    assert 2 * errors[False, False] < errors[False, True] < 2.0**-6
    assert errors[True, True] > 2.0**-7


@pytest.mark.parametrize("case", BLOCK_GEMMS)
def test_the_gemm_in_blocks_of_128(case: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 tensor cores")  # Ampere: Triton has no FP8 product to test there
    assert check_block_gemm(*case.split()[2:], device="cuda") == []


@pytest.mark.parametrize("block", ["1d", "2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cublaslt_and_triton_agree_on_blocks_of_128(block: str, dtype: torch.dtype) -> None:
    if not blocks_by_cublaslt(torch.device("cuda", 0)):
        # Hopper with CUDA 12.9 alone has it, and there it must agree with the reference.
        cuda = tuple(int(number) for number in str(torch.version.cuda).split("."))
        assert torch.cuda.get_device_capability()[0] != 9 or cuda < (12, 9)
        pytest.skip("cuBLASLt does not multiply FP8 in blocks of 128 here")
    g = torch.Generator("cuda").manual_seed(2)
    a, b = (
        quantize(torch.randn(rows, 640, device="cuda", generator=g), QuantSpec("fp8_e4m3", kind))
        for rows, kind in ((528, "1d"), (384, block))
    )
    assert a.scales is not None and b.scales is not None
    sides = (
        (a.codes, cublaslt.block_layout(a.scales, tiles=False)),
        (
            b.codes,
            cublaslt.block_layout(b.scales, tiles=block == "2d"),
        ),
    )
    one, other = (torch.ones(528, 384, device="cuda", dtype=dtype) for _ in range(2))
    cublaslt.matmul(sides[0][0], sides[1][0], one, scales=(sides[0][1], sides[1][1]))
    block_matmul(*sides, other)
    # both add five scaled sums of 128 in FP32; a sum keeps 14 bits
    limit = a.values().abs() @ b.values().abs().t() * 2.0**-11 + other.abs() * 2.0**-8
    assert ((one.float() - other.float()).abs() <= limit).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp4 2d", "mxfp4 unbiased", "mxfp8"])
def test_native_products_are_the_reference_s(name: str) -> None:
    device, recipe = torch.device("cuda", 0), RECIPES[name]
    native, reference = NativeBackend(), ReferenceBackend()
    reasons = refusals(native, [recipe], device)
    if reasons:
        assert torch.cuda.get_device_capability()[0] not in (10, 12), reasons
        pytest.skip(reasons[0])  # no such instruction: with one, the line above fails
    casts = casts_of(recipe)
    g = torch.Generator("cuda").manual_seed(3)
    x, w = (torch.randn(n, 256, device=device, generator=g).bfloat16() for n in (512, 384))
    a, b = native.quantize(x, [casts["fprop.x"]])[0], native.quantize(w, [casts["fprop.w"]])[0]
    ra, rb = (reference.quantize(t, [casts[c]])[0] for t, c in ((x, "fprop.x"), (w, "fprop.w")))
    want = reference.gemm(ra, rb, out_dtype=torch.float32)
    magnitude = ra.values.abs().float() @ rb.values.abs().float().t()
    for v in (ra.alpha, rb.alpha):
        magnitude = magnitude if v is None else magnitude * v
    main = torch.ones_like(want)
    native.gemm(a, b, out_dtype=torch.float32, accumulate_into=main)
    assert ((main - 1 - want).abs() <= magnitude * 2.0**-9 + 2.0**-20).all()
    half = native.gemm(a, b, out_dtype=torch.bfloat16).float()
    assert ((half - want).abs() <= magnitude * 2.0**-9 + want.abs() * 2.0**-8).all()


def test_hopper_has_no_block_scaled_instruction() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a law of Hopper")  # elsewhere the products are held to the reference above
    for format_ in ("nvfp4", "mxfp4", "mxfp8"):
        spec = QuantSpec(format_)
        reason = NativeBackend().why_not(Fprop(spec, spec), torch.device("cuda", 0))
        assert reason is not None and "has no matrix instruction" in reason
