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


def four_over_six_scales(x: np.ndarray, *, s_enc: np.floating, divide_first: bool) -> np.ndarray:
    """Candidates (to 6, to 4) of every block [2, r, c / 16], in one of two orders of operations.

    arXiv:2512.02010 divides the block's amax first; NVFP4's default multiplies S_enc by fp32(1/6)
    first, which is not bit-equal.
    """
    amax = np.abs(x).reshape(len(x), -1, 16).max(-1)
    scale = amax / F(6) * s_enc if divide_first else amax * (s_enc * F(1 / 6))
    wanted = [np.minimum(scale, F(448)), np.minimum(scale * F(1.5), F(448))]
    return np.stack([nearest_code(one, E4M3) for one in wanted])


@pytest.mark.parametrize("seed", range(3))
def test_four_over_six(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((256, 512)) * 2.0 ** rng.integers(-2, 3, (256, 1))).astype(F)
    amax = F(40 + seed / 3)
    x[0, 0] = amax
    s_enc = F(256 * 6) / amax
    # blocks whose scale is a tie of E4M3 but for an ulp, where the order of operations decides
    middles = ((E4M3[40:100] + E4M3[41:101]) / 2).astype(F)
    ties = (middles * F(6) / s_enc)[rng.integers(0, 60, (128, 32))]
    x[128:] *= (ties / 99).repeat(16, 1)
    x[128:, ::16] = np.nextafter(ties, F(seed - 1) * F(99), dtype=F)
    codes = four_over_six_scales(x, s_enc=s_enc, divide_first=True)
    errors = []
    for scale in E4M3[codes].astype(F):
        spread = scale.repeat(16, 1)
        with np.errstate(divide="ignore"):
            enc = np.minimum(F(1) / (scale * (F(1) / s_enc)), FLT_MAX).repeat(16, 1)
        q = np.copysign(E2M1[nearest_code(x * enc, E2M1)], x)
        errors.append(((q * spread - x * s_enc) ** 2).reshape(256, -1, 16).sum(-1))
    want = np.where(errors[1] < errors[0], codes[1], codes[0])
    q = quantize(torch.from_numpy(x), QuantSpec("nvfp4", scale="four_over_six"))
    got = q.scales.view(torch.uint8).numpy()
    # errors within fp32's own rounding of each other may fall either way
    clear = np.abs(errors[1] - errors[0]) > 1e-5 * errors[0]
    assert clear.mean() > 0.8 and (got == want)[clear].all()
    other = four_over_six_scales(x, s_enc=s_enc, divide_first=False)
    assert (other != codes).any()  # so the other order of operations fails above


def test_int4_is_nvfp4_s_scales_over_equal_steps() -> None:
    x = heavy_tailed(32, 256, 4)
    y, scale_code, alpha = nvfp4(x, cap=448, top=7.0)
    q = quantize(torch.from_numpy(x), QuantSpec("int4"))
    assert (q.scales.view(torch.uint8).numpy() == scale_code).all()
    code = np.abs(np.rint(y.clip(-7, 7))).astype(int)
    assert (unpacked(q.codes) == code + 8 * (y < 0)).all()
    values = np.copysign(code, y) * E4M3[scale_code].repeat(16, 1)
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
