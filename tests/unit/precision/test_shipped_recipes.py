"""Every recipe in configs/precision is its paper's, operand by operand.

The table below is written from the papers, not from the YAML or the code.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from functools import cache

import pytest

from fp4pretrain.config import compose, plan_of
from fp4pretrain.precision import BF16, Keep, Plan, Progress, Recipe, Rotation, Tail
from fp4pretrain.presets import groups

NONE = Rotation()
PLAIN = ("bf16", (1, 1), "nearest", "default")
# (format, block rows x cols or 0 for the whole axis, rounding, scale)
E4M3, E5M2 = (("fp8_" + e, (0, 0), "nearest", "default") for e in ("e4m3", "e5m2"))
E4M3_1D, E4M3_2D = (("fp8_e4m3", (rows, 128), "nearest", "default") for rows in (1, 128))
MXFP8 = ("mxfp8", (1, 32), "nearest", "rceil")
NV_1D, NV_2D = (("nvfp4", (rows, 16), "nearest", "default") for rows in (1, 16))
NV_SR = ("nvfp4", (1, 16), "stochastic", "default")
INT_1D, INT_2D = (("int4", (rows, 16), "nearest", "default") for rows in (1, 16))
INT_SR = ("int4", (1, 16), "stochastic", "default")
MX_SR = ("mxfp4", (1, 32), "stochastic", "unbiased")
MX_EVEN = ("mxfp4", (1, 32), "nearest", "even")

RHT64 = Rotation("random_hadamard", 64, "gemm", "seed")
H16 = Rotation("hadamard", 16, dtype="fp32")
RHT_TE = Rotation("random_hadamard", 16, "never", "te")

# fprop x, w, rotation; dgrad dy, w, rotation; wgrad dy, x, rotation
TRUTH = {
    "bf16": (PLAIN, PLAIN, NONE, PLAIN, PLAIN, NONE, PLAIN, PLAIN, NONE),
    # numerics.md: e4m3 for x and w, e5m2 for dy (hybrid), current scaling
    "fp8": (E4M3, E4M3, NONE, E5M2, E4M3, NONE, E5M2, E4M3, NONE),
    # arXiv:2509.25149: E4M3, 128x128 weights, 1x128 activations
    "fp8_block": (E4M3_1D, E4M3_2D, NONE, E4M3_1D, E4M3_2D, NONE, E4M3_1D, E4M3_1D, NONE),
    # arXiv:2506.08027: E4M3 everywhere, rceil
    "mxfp8": (MXFP8, MXFP8, NONE, MXFP8, MXFP8, NONE, MXFP8, MXFP8, NONE),
    # arXiv:2509.25149: 2D weights, SR on gradients only, H16 on both wgrad operands, fixed signs
    "nvfp4": (NV_1D, NV_2D, NONE, NV_SR, NV_2D, NONE, NV_SR, NV_1D, RHT_TE),
    # paper A's, with another element
    "int4": (INT_1D, INT_2D, NONE, INT_SR, INT_2D, NONE, INT_SR, INT_1D, RHT_TE),
    # arXiv:2502.20586: forward in BF16, SR on both operands, RHT g = 64, fresh signs each GEMM
    "mxfp4_rht_sr": (PLAIN, PLAIN, NONE, MX_SR, MX_SR, RHT64, MX_SR, MX_SR, RHT64),
    # arXiv:2605.09825: all linears MXFP4, even scale, no SR, H16 on all three GEMMs
    "mxfp4_h16": (MX_EVEN, MX_EVEN, H16, MX_EVEN, MX_EVEN, H16, MX_EVEN, MX_EVEN, H16),
}


# Transformer Engine's Float8CurrentScaling splits its accumulator in dgrad and wgrad; the sums of MXFP4
# that FP8 carries are fast where the target of its speed asks for it, and never those of gradients of w.
FAST = {"fp8": ("fprop",), "mxfp4_h16": ("fprop", "dgrad")}


@cache
def shipped(name: str, *overrides: str) -> Plan:
    return plan_of(compose([f"precision={name}", *overrides]))


def table_of(recipe: Recipe) -> tuple:
    rows: list = []
    for gemm, operands in (
        ("fprop", ("x", "w")), ("dgrad", ("dy", "w")), ("wgrad", ("dy", "x"))
    ):  # fmt: skip
        for operand in operands:
            spec = getattr(getattr(recipe, gemm), operand)
            rows.append((spec.format, spec.row.blocks[spec.block], spec.rounding, spec.scale))
        rows.append(getattr(recipe, gemm).rotation)
    return tuple(rows)


def test_every_shipped_recipe_has_its_truth() -> None:
    assert set(TRUTH) == set(groups()["precision"])


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_a_recipe_is_its_papers(name: str) -> None:
    plan = shipped(name)
    assert table_of(plan.recipe) == TRUTH[name]
    fast = tuple(g for g in ("fprop", "dgrad", "wgrad") if plan.recipe.gemm(g).fast_accum)
    assert fast == FAST.get(name, ())
    assert plan.recipe.warnings() == []
    assert all(s.ties == "even" for _, _, s in plan.recipe.operands())


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_only_paper_a_s_recipe_keeps_blocks_and_nothing_switches_late(name: str) -> None:
    plan = shipped(name)
    assert plan.tail.at is None
    # arXiv:2509.25149: the first 2 and the last 8 of 62 blocks
    kept = [rule.blocks for rule in plan.keep.rules(62)]
    assert kept == (["0:2", "54:"] if name in ("nvfp4", "int4") else [])
    assert plan.keep.modules == ()


@pytest.mark.parametrize("layers, first, last", [(4, 0, 1), (20, 1, 3), (62, 2, 8)])
def test_nvfp4_keeps_the_papers_share_at_every_depth(layers: int, first: int, last: int) -> None:
    plan = shipped("nvfp4", f"model.num_layers={layers}")
    expected = {*range(first), *range(layers - last, layers)}
    found = {i for i in range(layers) if plan.at(i, "mlp.linear_fc1", Progress()) is BF16}
    assert found == expected


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_the_table_in_the_log_says_what_the_recipe_computes(name: str) -> None:
    recipe = shipped(name).recipe
    lines = str(recipe).splitlines()
    assert lines[0].split() == ["GEMM", "operand", "format", "block", "rounding", "scale",
                                "rotation"]  # fmt: skip
    fast = ", ".join(FAST.get(name, ()))
    assert lines[2 + 6 :] == ([f"fast_accum on FP8 tensor cores: {fast}"] if fast else [])
    operands = [row for row in TRUTH[name] if isinstance(row, tuple)]
    where = ["fprop x", "fprop w", "dgrad dy", "dgrad w", "wgrad dy", "wgrad x"]
    for line, place, (form, block, rounding, scale) in zip(
        lines[2:8], where, operands, strict=True
    ):
        cells = line.split()
        shape = "-" if form == "bf16" else "tensor" if block == (0, 0) else f"{block[0]}x{block[1]}"
        said = scale if form != "bf16" else "-"
        assert cells[:6] == [*place.split(), form, shape, rounding, said]
        rotation = getattr(recipe, place.split()[0]).rotation
        assert (cells[6:] == ["-"]) == (rotation.kind == "none")
        assert f"H{rotation.size}" in line or rotation.kind == "none"


def test_recipes_and_plans_are_values() -> None:
    """Equal when made twice, usable as keys, not to be changed: a cache may be keyed by them."""
    plans = [shipped(name) for name in TRUTH]
    again = [shipped.__wrapped__(name) for name in TRUTH]
    assert plans == again
    assert {hash(p) for p in plans} == {hash(p) for p in again}
    assert len({p.recipe for p in plans}) == len(TRUTH)
    for value, field in (
        (plans[0], "recipe"), (plans[0].recipe, "fprop"), (plans[0].recipe.fprop, "x"),
        (Keep(), "modules"), (Tail(), "at"), (Rotation(), "size"),
    ):  # fmt: skip
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)


def test_bf16_is_the_recipe_without_a_cast() -> None:
    assert shipped("bf16").recipe == BF16
    assert not BF16.quantized
    assert all(shipped(name).recipe.quantized for name in TRUTH if name != "bf16")
