"""GEMMs of the kernels against float64: block-scaled, FP8 in blocks of 128, and the backend's own."""

from __future__ import annotations

import torch
from fp4_kernels.block_gemm import TILE, block_matmul
from fp4_kernels.native import native_matmul
from inputs import sample

from fp4pretrain import numerics
from fp4pretrain.ops import Cast
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.ops.triton_backend import TritonBackend
from fp4pretrain.ops.triton_operand import multiply

BLOCK_GEMMS = ("block gemm 1d store", "block gemm 1d add", "block gemm 2d store")


def check_native(accumulate: bool, format_: str = "mxfp4") -> list[str]:
    """The block-scaled GEMM, mxfp4, mxfp8 (the interpreter reads E4M3 scales as E8M0), odd edges."""
    spec = numerics.QuantSpec(format_)
    a = numerics.quantize(sample("plain", (40, 96), 1), spec)
    b = numerics.quantize(sample("plain", (24, 96), 2), spec)
    start = torch.ones(40, 24)
    out = start.clone()
    alpha = torch.tensor(0.5)
    native_matmul(
        (a.codes, a.scales), (b.codes, b.scales), out,
        alpha=alpha, accumulate=accumulate, tile=(32, 32, 64, 4, 1),
    )  # fmt: skip
    products = a.values().double() @ b.values().double().t() * 0.5
    # fp32 sums of 96 products: 96 * 2^-24 of the sum of magnitudes
    limit = a.values().abs().double() @ b.values().abs().double().t() * 96 * 2.0**-24
    wrong = (out - products - accumulate * start).abs() > limit + 2.0**-22
    return [f"{int(wrong.sum())} sums off"] if wrong.any() else []


def check_block_gemm(block: str, store: str, *, device: str = "cpu") -> list[str]:
    """The FP8 GEMM in blocks of 128, E5M2 by E4M3, edges that hang over its tiles."""
    e4m3, e5m2 = numerics.QuantSpec("fp8_e4m3", block), numerics.QuantSpec("fp8_e5m2", "1d")
    a = numerics.quantize(sample("plain", (144, 384), 1).to(device), e5m2)
    b = numerics.quantize(sample("plain", (256, 384), 2).to(device), e4m3)
    out = torch.ones(144, 256, device=device)
    before = 1.0 if store == "add" else 0.0
    assert a.scales is not None and b.scales is not None
    block_matmul(
        (a.codes, a.scales.t().contiguous().t()), (b.codes, b.scales), out,
        accumulate=store == "add", tile=(32, 128, 2, 4, 1) if device == "cpu" else TILE,
    )  # fmt: skip
    av, bv = a.values().double(), b.values().double()
    # Hopper cuts at 2^-12 of the magnitudes at each of 128 / 32 additions (see backend_laws)
    limit = av.abs() @ bv.abs().t() * (2.0**-10 if device == "cuda" else 384 * 2.0**-24)
    wrong = (out - av @ bv.t() - before).abs() > limit + 2.0**-22
    return [f"{int(wrong.sum())} sums off"] if wrong.any() else []


def check_block_linear() -> list[str]:
    """The backend's own operands and GEMMs in blocks of 128, all three, beside the reference's."""
    x, w, dy = (
        sample("plain", shape, i) for i, shape in enumerate(((256, 128), (128, 128), (256, 128)))
    )
    vector, tile = (numerics.QuantSpec("fp8_e4m3", block) for block in ("1d", "2d"))
    casts = {
        "y": ((x, Cast(vector)), (w, Cast(tile))),
        "dx": ((dy, Cast(vector)), (w, Cast(tile, transpose=True))),
        "dw": ((dy, Cast(vector, transpose=True)), (x, Cast(vector, transpose=True))),
    }
    bad = []
    for name, pair in casts.items():
        a, b = (TritonBackend().quantize(t, [cast])[0] for t, cast in pair)
        ra, rb = (ReferenceBackend().quantize(t, [cast])[0] for t, cast in pair)
        main = torch.ones(a.shape[0], b.shape[0])
        multiply(
            a, b, out_dtype=torch.float32, out=main, fast_accum=False, blocks_by_cublaslt=False
        )
        want = ra.values.double() @ rb.values.double().t() + 1
        limit = ra.values.abs().double() @ rb.values.abs().double().t() * a.shape[1] * 2.0**-24
        wrong = (main - want).abs() > limit + 2.0**-22
        bad += [f"{name}: {int(wrong.sum())} sums off"] if wrong.any() else []
    return bad
