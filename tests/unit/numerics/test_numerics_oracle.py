"""A second, slow opinion: grids enumerated, nearest found by search, scales in numpy's fp32.

Nothing here shares a line or a trick with the code under test. Inputs are heavy-tailed, so blocks
underflow, saturate and tie.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp4pretrain.numerics import FORMATS, QuantSpec, quantize

F = np.float32
FLT_MAX = np.finfo(np.float32).max
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp8_grid(exponent_bits: int, mantissa_bits: int, codes: int) -> np.ndarray:
    """Magnitudes of the first ``codes`` FP8 codes, by the definition of a float."""
    bias = 2 ** (exponent_bits - 1) - 1
    code = np.arange(codes)
    exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
    normal = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    return np.where(exponent > 0, normal, mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))


E4M3, E5M2 = fp8_grid(4, 3, 0x7F), fp8_grid(5, 2, 0x7C)
GRIDS = {"e2m1": E2M1, "e4m3": E4M3, "e5m2": E5M2}


def nearest_code(y: np.ndarray, grid: np.ndarray, *, ties: str = "even") -> np.ndarray:
    """The code of the grid magnitude closest to |y|; a tie to the even code, or to the larger."""
    magnitude = np.minimum(np.abs(y).astype(np.float64), grid[-1])
    distance = np.abs(magnitude[..., None] - grid)
    low = distance.argmin(-1)
    high = len(grid) - 1 - distance[..., ::-1].argmin(-1)
    if ties == "away":
        return high
    return np.where(low % 2 == 0, low, high)


def nvfp4(x: np.ndarray, *, cap: float, top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scaled elements [r, c], scale codes [r, c/16] and alpha, in numerics.md's order."""
    amax = np.abs(x).max()
    s_enc = min(F(cap * top) / amax, FLT_MAX) if amax else F(1)
    s_dec = F(1) / s_enc
    block_amax = np.abs(x).reshape(len(x), -1, 16).max(-1)
    wanted = block_amax * (s_enc * F(1 / top))
    scale_code = nearest_code(np.minimum(wanted, F(448)), E4M3)
    scale = E4M3[scale_code].astype(F)
    with np.errstate(divide="ignore", over="ignore"):
        enc = np.minimum(F(1) / (scale * s_dec), FLT_MAX)
        return x * enc.repeat(16, 1), scale_code, amax / F(cap * top)


def heavy_tailed(rows: int, cols: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * np.exp(
        3 * rng.standard_normal((rows, cols // 16))
    ).repeat(16, 1)
    x[rng.random((rows, cols)) < 0.02] = 0.0
    x[1, :48] = 0.0
    # A coarse copy makes exact ties common.
    x[: rows // 2] = np.round(x[: rows // 2] * 8) / 8
    return x.astype(F)


def unpacked(codes: torch.Tensor) -> np.ndarray:
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).numpy()


@pytest.mark.parametrize("ties", ["even", "away"])
@pytest.mark.parametrize(
    "rule, cap, top", [("default", 448, 6.0), ("cap256", 256, 6.0), ("unbiased", 448, 96 / 17)]
)
@pytest.mark.parametrize("seed", range(3))
def test_nvfp4(rule: str, cap: float, top: float, ties: str, seed: int) -> None:
    x = heavy_tailed(32, 256, seed)
    y, scale_code, alpha = nvfp4(x, cap=cap, top=top)
    q = quantize(torch.from_numpy(x), QuantSpec("nvfp4", ties=ties, scale=rule))
    assert (q.scales.view(torch.uint8).numpy() == scale_code).all()
    assert (scale_code == 0).any() and (scale_code > 8).any()
    code = nearest_code(y, E2M1, ties=ties) + 8 * (y < 0)
    assert (unpacked(q.codes) == code).all()
    values = np.where(code >= 8, -1, 1) * E2M1[code & 7] * E4M3[scale_code].repeat(16, 1)
    assert (q.dequantize().numpy() == values.astype(F) * alpha).all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8_e5m2"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil"])
@pytest.mark.parametrize("seed", range(2))
def test_mx(name: str, rule: str, seed: int) -> None:
    x = heavy_tailed(32, 256, seed)
    grid = GRIDS[FORMATS[name].element.name]
    amax = np.abs(x).reshape(32, -1, 32).max(-1).astype(np.float64)
    with np.errstate(divide="ignore"):
        exponent = {
            "floor": np.floor(np.log2(amax)) - np.floor(np.log2(grid[-1])),
            "ceil": np.ceil(np.log2(amax)) - np.floor(np.log2(grid[-1])),
            "rceil": np.ceil(np.log2((amax.astype(F) * F(1 / grid[-1])).astype(np.float64))),
        }[rule].clip(-127, 127)
    q = quantize(torch.from_numpy(x), QuantSpec(name, scale=rule))
    assert (q.scales.view(torch.uint8).numpy() == exponent + 127).all()
    y = x * (2.0**-exponent).repeat(32, 1)
    code = nearest_code(y, grid)
    got = unpacked(q.codes) if name == "mxfp4" else q.codes.view(torch.uint8).numpy()
    negative = 8 * (y < 0) if name == "mxfp4" else 128 * np.signbit(x)  # FP8 keeps -0.0
    assert (got == code + negative).all()
    values = np.where(y < 0, -1, 1) * grid[code] * (2.0**exponent).repeat(32, 1)
    assert (q.dequantize().numpy() == values).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize(
    "block, shape",
    [("tensor", (128, 256)), ("row", (1, 256)), ("1d", (1, 128)), ("2d", (128, 128))],
)
@pytest.mark.parametrize("scale", ["default", "pow2"])
def test_fp8(name: str, block: str, shape: tuple[int, int], scale: str) -> None:
    x = heavy_tailed(128, 256, 5)
    grid = GRIDS[FORMATS[name].element.name]
    tiles = np.abs(x).reshape(128 // shape[0], shape[0], 256 // shape[1], shape[1])
    factor = F(grid[-1]) / tiles.max((1, 3))
    if scale == "pow2":
        factor = (2.0 ** np.floor(np.log2(factor.astype(np.float64)))).astype(F)
    spread = factor.repeat(shape[0], 0).repeat(shape[1], 1)
    q = quantize(torch.from_numpy(x), QuantSpec(name, block, scale=scale))
    assert (q.scales.numpy() == F(1) / factor).all()
    y = x * spread
    code = nearest_code(y, grid)
    assert (q.codes.view(torch.uint8).numpy() == code + 128 * np.signbit(x)).all()
    inverse = (F(1) / factor).repeat(shape[0], 0).repeat(shape[1], 1)
    assert (
        q.dequantize().numpy() == np.where(y < 0, -1, 1).astype(F) * grid[code].astype(F) * inverse
    ).all()


def test_bf16_is_a_plain_cast() -> None:
    x = torch.randn(8, 40)
    q = quantize(x, QuantSpec())
    assert torch.equal(q.codes, x.bfloat16()) and q.scales is None
    assert torch.equal(q.dequantize(), x.bfloat16().float())
