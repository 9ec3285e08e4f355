"""Hand-derived vectors (tests/golden): every tie, zero, underflow, subnormal and edge by name."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fp4pretrain.numerics import QuantSpec, emulate, quantize
from fp4pretrain.numerics.formats import FORMATS
from fp4pretrain.numerics.scaling import e8m0_round_up, mx_scale_bytes

GOLDEN = Path(__file__).parents[2] / "golden"


def load(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def from_bits(bits: str) -> float:
    return struct.unpack(">f", bytes.fromhex(bits))[0]


def number(value: float | str) -> float:
    return from_bits(value) if isinstance(value, str) else value


def unpack(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def moved(row: dict) -> float:
    target = math.inf if row["next"] > 0 else 0.0
    return (
        float(np.nextafter(np.float32(row["value"]), np.float32(target)))
        if row["next"]
        else row["value"]
    )


@pytest.mark.parametrize("ties", ["even", "away"])
@pytest.mark.parametrize("row", load("e2m1_rounding")["rows"], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_e2m1_code_of_a_scaled_value(row: dict, ties: str, sign: float) -> None:
    value = sign * moved(row)
    # The 4 fixes the floor scale at 1 for anything below 8, so values are scaled already.
    x = torch.tensor([[value, 4.0] + [0.0] * 30])
    q = quantize(x, QuantSpec(format="mxfp4", ties=ties))
    negative = value < 0
    assert unpack(q.codes)[0, 0].item() == row[ties] + (8 if negative else 0)
    assert q.scales.view(torch.uint8).item() == 127


@pytest.mark.parametrize("bits, byte", load("e8m0_scales")["round_up"])
def test_e8m0_round_up(bits: str, byte: int) -> None:
    assert e8m0_round_up(torch.tensor([from_bits(bits)])).item() == byte


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize(
    "name, row",
    [(name, row) for name, rows in load("e8m0_scales")["blocks"].items() for row in rows],
    ids=lambda v: v["why"] if isinstance(v, dict) else v,
)
def test_e8m0_byte_of_a_block(name: str, row: dict, rule: str) -> None:
    amax = from_bits(row["amax"])
    byte = mx_scale_bytes(torch.tensor([amax]), FORMATS[name].element, rule)
    assert byte.item() == row[rule]
    x = torch.zeros(1, 32)
    x[0, 17] = -amax
    assert quantize(x, QuantSpec(name, scale=rule)).scales.view(torch.uint8).item() == row[rule]


@pytest.mark.parametrize("row", load("nvfp4_blocks")["rows"], ids=lambda r: r["why"])
def test_nvfp4_block(row: dict) -> None:
    x = torch.zeros(1, 16)
    x[0, : len(row["block"])] = torch.tensor([number(v) for v in row["block"]])
    amax = torch.tensor(number(row["amax"]))
    q = quantize(x, QuantSpec(format="nvfp4"), amax=amax)
    assert q.scales.view(torch.uint8).item() == int(row["scale"], 16)
    assert unpack(q.codes)[0, : len(row["block"])].tolist() == row["codes"]
    assert q.amax.item() == amax.item()


@pytest.mark.parametrize("name, top", [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
def test_fp8_codes(name: str, top: float) -> None:
    rows = load("fp8_codes")[name]
    x = torch.tensor([[value for value, _ in rows]])
    q = quantize(x, QuantSpec(format=name), amax=torch.tensor(top))
    got = [f"{byte:02X}" for byte in q.codes.view(torch.uint8)[0].tolist()]
    assert got == [code for _, code in rows]
    assert q.scales.item() == 1.0


def test_even_element_is_the_low_nibble() -> None:
    x = torch.tensor([[0.5, -1.0, 6.0, 3.0] + [0.0] * 28])
    q = quantize(x, QuantSpec(format="mxfp4"))
    assert q.codes[0, :2].tolist() == [0x1 | 0xA << 4, 0x7 | 0x5 << 4]


def test_nvfp4_dequantizes_by_amax_over_2688() -> None:
    x = torch.tensor([[6.0, -3.0, 0.5] + [0.0] * 13])
    q = quantize(x, QuantSpec(format="nvfp4"), amax=torch.tensor(2688.0))
    assert q.dequantize()[0, :3].tolist() == [6.0, -3.0, 0.5]
    q.amax = torch.tensor(1344.0)
    assert q.dequantize()[0, :3].tolist() == [3.0, -1.5, 0.25]


@pytest.mark.parametrize(
    "rule, cap, top", [("default", 448, 6.0), ("cap256", 256, 6.0), ("four_over_six", 256, 6.0)]
)
def test_the_amax_of_a_tensor_meets_the_cap(rule: str, cap: float, top: float) -> None:
    x = torch.zeros(1, 16)
    x[0, 3] = 5.0
    q = quantize(x, QuantSpec(format="nvfp4", scale=rule))
    assert q.scales.float().item() == cap
    assert unpack(q.codes)[0, 3].item() == 7
    assert q.dequantize()[0, 3].item() == 5.0


def test_unbiased_nvfp4_leaves_room_above_the_amax() -> None:
    """The amax is encoded to 6 * 16/17 under scale 448 and rounds up to 6."""
    x = torch.zeros(1, 16)
    x[0, 3] = 5.0
    q = quantize(x, QuantSpec(format="nvfp4", scale="unbiased"))
    assert q.scales.float().item() == 448.0
    assert q.alpha().item() == pytest.approx(5.0 / (448 * 6 * 16 / 17), rel=1e-6)


def test_unbiased_mxfp4_shrinks_by_three_quarters_and_undoes_it() -> None:
    x = torch.tensor([[8.0, 4.0] + [0.0] * 30])  # floor exponent 1: scaled 4 and 2, then 3 and 1.5
    q = quantize(x, QuantSpec(format="mxfp4", scale="unbiased"))
    assert unpack(q.codes)[0, :2].tolist() == [5, 3]
    assert q.scales.view(torch.uint8).item() == 128
    assert q.alpha().item() == np.float32(4 / 3)
    assert q.dequantize()[0, :2].tolist() == [8.0, 4.0]


@pytest.mark.parametrize(
    "block, scale, code",
    [
        # 6 and 4 with neighbours on the grid of 6: 3 = 6/2 is exact there, 2.67 * 1.5 is not.
        ([6.0, 3.0, 3.0, 3.0], 1.0, 7),
        # amax 4 x 4.5/4: to 6 gives 4.5/6 -> .75; 4.5 at 6, 3.375 at 4.5 (error); to 4 gives
        # scale 1.125: 4.5 at 4, 3.375 at 3, both exact.
        ([4.5, 3.375, 3.375, 3.375], 1.125, 6),
        # Only the amax: both represent it exactly, the tie goes to 6.
        ([6.0], 1.0, 7),
    ],
)
def test_four_over_six_takes_the_smaller_error(block: list, scale: float, code: int) -> None:
    x = torch.zeros(1, 16)
    x[0, : len(block)] = torch.tensor(block)
    # amax 1536 = 256 * 6: S_enc is 1.
    q = quantize(x, QuantSpec("nvfp4", scale="four_over_six"), amax=torch.tensor(1536.0))
    assert q.scales.float().item() == scale
    assert unpack(q.codes)[0, 0].item() == code


POISON = [math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("bad", POISON)
@pytest.mark.parametrize("rule", ["default", "unbiased", "cap256", "four_over_six"])
@pytest.mark.parametrize("block", ["1d", "2d"])
def test_nonfinite_poisons_a_whole_nvfp4_tensor(bad: float, rule: str, block: str) -> None:
    x = torch.ones(32, 32)
    x[5, 7] = bad
    spec = QuantSpec("nvfp4", block, scale=rule)
    q = quantize(x, spec)
    assert (q.scales.view(torch.uint8) == 0x7F).all()
    assert (q.codes == 0).all()
    assert q.amax.isnan() == math.isnan(bad) and not q.amax.isfinite()
    assert q.dequantize().isnan().all()
    values, alpha = emulate(x, spec)
    assert (values * alpha).isnan().all()


@pytest.mark.parametrize("bad", POISON)
def test_nonfinite_poisons_its_block_under_a_finite_given_amax(bad: float) -> None:
    x = torch.ones(1, 32)
    x[0, 20] = bad
    q = quantize(x, QuantSpec("nvfp4"), amax=torch.tensor(1.0))
    assert q.dequantize().isnan().tolist() == [[False] * 16 + [True] * 16]
    assert (q.codes[0, 8:] == 0).all()


@pytest.mark.parametrize("bad", POISON)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8_e5m2"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_nonfinite_poisons_its_mx_block_only(bad: float, name: str, rule: str) -> None:
    x = torch.ones(2, 64)
    x[1, 40] = bad
    q = quantize(x, QuantSpec(name, scale=rule))
    assert q.scales.view(torch.uint8)[1, 1].item() == 255
    assert (q.codes.view(torch.uint8)[1, q.codes.shape[1] // 2 :] == 0).all()
    wrong = torch.zeros(2, 64, dtype=torch.bool)
    wrong[1, 32:] = True
    assert torch.equal(q.dequantize().isnan(), wrong)
    values, alpha = emulate(x, QuantSpec(name, scale=rule))
    assert torch.equal((values * alpha).isnan(), wrong)


@pytest.mark.parametrize("bad", POISON)
@pytest.mark.parametrize("scale", ["default", "pow2"])
@pytest.mark.parametrize("block, share", [("tensor", 1.0), ("row", 1 / 128), ("2d", 1 / 2)])
def test_nonfinite_poisons_its_fp8_block(bad: float, scale: str, block: str, share: float) -> None:
    x = torch.ones(128, 256)
    x[3, 200] = bad
    q = quantize(x, QuantSpec("fp8_e4m3", block, scale=scale))
    nan = q.dequantize().isnan()
    assert nan[3, 200] and nan.float().mean().item() == share
    assert torch.equal(q.codes.float().isnan(), nan)
