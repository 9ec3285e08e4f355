"""Small products with known results, multiplied on the device before a run trusts it with large ones.

What cannot be tested where this project is tested (another GPU's instructions, a library's scale layouts)
is tested where it is about to be used: once a process, in milliseconds.
"""

from __future__ import annotations

from functools import cache

import torch
from fp4_kernels import cublaslt, scaled_mm
from fp4_kernels.native import native_matmul
from torch import Tensor

from fp4pretrain.numerics import QuantizedTensor, QuantSpec, quantize

# The block-scaled GEMMs of the native backend, by preference.
NATIVE_PATHS = ("scaled_mm", "dot_scaled")


@cache
def blocks_by_cublaslt(device: torch.device) -> bool:
    """Whether cuBLASLt multiplies FP8 in blocks of 128 here, and as the recipe means it.

    Its scale modes are Hopper's, from CUDA 12.9 on. Both pairs that recipes have are tried: vectors
    by tiles (x by w), vectors by vectors (dy by x) added to what is there.
    """
    if device.type != "cuda" or torch.version.hip or cublaslt.why_missing():
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    g = torch.Generator().manual_seed(1)
    rows, k = 256, 384
    a, b = (torch.randint(-8, 9, (rows, k), generator=g).float() for _ in "ab")
    vectors = torch.exp2(torch.randint(-4, 5, (rows, k // 128), generator=g).float())
    tiles = torch.exp2(torch.randint(-4, 5, (rows // 128, k // 128), generator=g).float())
    for factors, tall in ((tiles, 128), (vectors.flip(0), 1)):
        want = _scaled(a, vectors, 1) @ _scaled(b, factors, tall).t() + 1
        out = torch.ones(rows, rows, device=device)
        try:
            cublaslt.matmul(
                a.to(device, torch.float8_e4m3fn),
                b.to(device, torch.float8_e4m3fn),
                out,
                accumulate=True,
                scales=(
                    cublaslt.block_layout(vectors.to(device), tiles=False),
                    cublaslt.block_layout(factors.to(device), tiles=tall > 1),
                ),
            )
        except cublaslt.CublasError:
            return False
        # integers below 2^13 a block: exact in any accumulator, so only a wrong scale differs
        if not torch.allclose(out.cpu().double(), want, rtol=1e-4, atol=1e-2):
            return False
    return True


def _scaled(x: Tensor, factors: Tensor, tall: int) -> Tensor:
    """float64 x [rows, k] times the factors of its blocks."""
    return (x * factors.repeat_interleave(tall, 0).repeat_interleave(128, 1)).double()


@cache
def native_path(format_: str, device: torch.device) -> tuple[str | None, str]:
    """(the first of NATIVE_PATHS that multiplies a format right on the device, why others do not).

    torch's ``scaled_mm`` comes first, because cuBLASLt's kernels are tuned for each GPU. It is taken
    only where it gives the reference's numbers here: it was written for GPUs this project could not
    be tried on, and a wrong layout of scales would train silently worse.
    """
    said: list[str] = []
    for path in NATIVE_PATHS:
        reason = scaled_mm.why_missing(format_) if path == "scaled_mm" else None
        reason = reason or _native_disagrees(path, format_, device)
        if reason is None:
            return path, "; ".join(said)
        said.append(f"{path}: {reason}")
    return None, "; ".join(said)


def _native_disagrees(path: str, format_: str, device: torch.device) -> str | None:
    """None if a small product of ``format_`` operands is the reference's, otherwise what is wrong."""
    g = torch.Generator().manual_seed(1)
    # block scales that differ between rows and along k, so that none can stand in for another
    along = torch.exp2(torch.arange(256) / 32)
    a, b = (
        quantize(
            torch.randn(n, 256, generator=g) * along * torch.exp2(torch.arange(n) % 7)[:, None],
            QuantSpec(format_),
        )
        for n in (160, 192)
    )
    av, bv = a.dequantize().double(), b.dequantize().double()
    want, magnitude = av @ bv.t(), av.abs() @ bv.abs().t()
    for dtype in (torch.float32, torch.bfloat16):
        try:
            got = _native_product(path, a, b, dtype, device).cpu().double()
        except torch.OutOfMemoryError:
            raise  # says nothing about the instruction
        except Exception as error:  # whatever else torch, Triton or the driver raise is a refusal
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        # at worst 14-bit sums of 256 products; a bfloat16 rounds to 2^-9
        if not ((got - want).abs() <= magnitude * 2.0**-9 + want.abs() * 2.0**-8).all():
            return f"its {dtype} product of a self-check is not the reference's"
    return None


def _native_product(
    path: str, a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """a @ b.T of two quantized matrices by one path, on the device."""
    codes, scales = ([t.to(device) for t in pair] for pair in ((a.codes, b.codes), _scales(a, b)))
    alphas = [q.alpha().to(device) for q in (a, b)] if a.amax is not None else None
    if path == "scaled_mm":
        swizzled = [scaled_mm.swizzle(s) for s in scales]
        return scaled_mm.scaled_matmul(
            (codes[0], swizzled[0]),
            (codes[1], swizzled[1]),
            out_dtype=dtype,
            alphas=None if alphas is None else (alphas[0], alphas[1]),
        )
    out = torch.empty((a.shape[0], b.shape[0]), dtype=dtype, device=device)
    alpha = None if alphas is None else alphas[0] * alphas[1]
    return native_matmul((codes[0], scales[0]), (codes[1], scales[1]), out, alpha=alpha)


def _scales(a: QuantizedTensor, b: QuantizedTensor) -> tuple[Tensor, Tensor]:
    assert a.scales is not None
    assert b.scales is not None
    return a.scales, b.scales
