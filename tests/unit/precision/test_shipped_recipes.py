"""Every recipe in configs/precision is its paper's, operand by operand.

The table below is written from the papers, not from the YAML or the code.
"""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from functools import cache
from pathlib import Path

import pytest
from covering import COVERING, words

from fp4pretrain.config import compose, plan_of
from fp4pretrain.precision import BF16, OPERANDS, Keep, Plan, Progress, Recipe, Rotation, Tail
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

EVERY = [(g, o) for g, operands in OPERANDS.items() for o in operands]
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


NV_46 = ("nvfp4", (1, 16), "nearest", "four_over_six")
NV_46_2D = ("nvfp4", (16, 16), "nearest", "four_over_six")
EDEN = ("nvfp4", (1, 16), "eden", "eden")
DOUBLE = ("nvfp4_double", (1, 16), "nearest", "default")
DOUBLE_SR = ("nvfp4_double", (1, 16), "stochastic", "unbiased")
LOCAL, LOCAL_2D = (("nvfp4_local", (rows, 16), "nearest", "default") for rows in (1, 16))
LOCAL_SR = ("nvfp4_local", (1, 16), "stochastic", "default")
UE, UE_2D = (("ue5m3", (rows, 16), "nearest", "default") for rows in (1, 16))
UE_SR = ("ue5m3", (1, 16), "stochastic", "default")
UE32, UE32_2D = (("ue5m3", (rows, 32), "nearest", "default") for rows in (1, 32))
UE32_SR = ("ue5m3", (1, 32), "stochastic", "default")
MX_FULL, MX_FULL_SR = (("mxfp4", (1, 32), how, "full_grid") for how in ("nearest", "stochastic"))
MX_FULL_2D = ("mxfp4", (32, 32), "nearest", "full_grid_adaptive")
MX_FLOOR = ("mxfp4", (1, 32), "nearest", "floor")
MX_EVEN_SR, MX_EVEN_2D = (
    ("mxfp4", (1, 32), "stochastic", "even"),
    ("mxfp4", (32, 32), "nearest", "even"),
)
E2M3, E3M2 = ((f"mxfp6_{e}", (1, 32), "nearest", "floor") for e in ("e2m3", "e3m2"))
H32 = Rotation("hadamard", 32, dtype="fp32")
H16_SIGNS = Rotation("random_hadamard", 16, "step", dtype="fp32")
RHT16, RHT128 = (Rotation("random_hadamard", n, "gemm") for n in (16, 128))
RHT32_FIXED, RHT16_FIXED = (Rotation("random_hadamard", n, "never", "seed") for n in (32, 16))
B_FORWARD = (PLAIN, PLAIN, NONE)
A_FORWARD, A_BACKWARD = TRUTH["nvfp4"][:3], TRUTH["nvfp4"][3:]
TRUTH |= {
    # arXiv:2509.25149: each of its ablations
    "nvfp4_no_sr": (*A_FORWARD, NV_1D, NV_2D, NONE, NV_1D, NV_1D, RHT_TE),
    "nvfp4_no_rht": (*A_FORWARD, NV_SR, NV_2D, NONE, NV_SR, NV_1D, NONE),
    "nvfp4_1d": (NV_1D, NV_1D, NONE, NV_SR, NV_1D, NONE, NV_SR, NV_1D, RHT_TE),
    **dict.fromkeys(("nvfp4_all", "nvfp4_last4", "nemotron3"), TRUTH["nvfp4"]),
    # arXiv:2502.20586: nearest, RHT alone, SR alone, and a forward pass in FP8
    "mxfp4_bwd": (*B_FORWARD, *(MX_FLOOR, MX_FLOOR, NONE) * 2),
    "mxfp4_bwd_rht": (*B_FORWARD, *(MX_FLOOR, MX_FLOOR, RHT64) * 2),
    "mxfp4_bwd_sr": (*B_FORWARD, *(MX_SR, MX_SR, NONE) * 2),
    "mxfp4_rht_sr_fp8": (E4M3, E4M3, NONE, *(MX_SR, MX_SR, RHT64) * 2),
    # arXiv:2605.09825, table 2: which GEMMs, and which stabilizer
    "mxfp4_plain": (MX_EVEN, MX_EVEN, NONE) * 3,
    "mxfp4_fprop": (MX_EVEN, MX_EVEN, NONE, *B_FORWARD * 2),
    "mxfp4_fprop_dgrad": (*(MX_EVEN, MX_EVEN, NONE) * 2, *B_FORWARD),
    "mxfp4_sr": (MX_EVEN, MX_EVEN, NONE, *(MX_EVEN_SR, MX_EVEN_SR, NONE) * 2),
    "mxfp4_random_h16": (MX_EVEN, MX_EVEN, H16_SIGNS) * 3,
    "mxfp4_h32": (MX_EVEN, MX_EVEN, H32) * 3,
    "mxfp4_h16_wgrad": (*(MX_EVEN, MX_EVEN, NONE) * 2, MX_EVEN, MX_EVEN, H16),
    "mxfp4_deoscillated": (*(MX_EVEN, MX_EVEN, NONE) * 2, MX_EVEN, MX_EVEN, H16),
    "mxfp4_h16_2d": (*(MX_EVEN, MX_EVEN_2D, NONE) * 2, MX_EVEN, MX_EVEN, H16),
    # arXiv:2512.02010: forward only; SR gradients keep paper A's scale
    "four_over_six": (NV_46, NV_46_2D, NONE, *A_BACKWARD),
    "four_over_six_all": (NV_46, NV_46_2D, NONE, NV_SR, NV_46_2D, NONE, NV_SR, NV_46, RHT_TE),
    # arXiv:2601.22813: 4/6 forward without 2D, MS-EDEN at d = 128 with fresh signs backward
    "quartet2": (NV_46, NV_46, NONE, *(EDEN, EDEN, RHT128) * 2),
    # arXiv:2510.27527: SR on all four backward operands, rotation in dgrad and wgrad, both of w and x from
    # the forward's copies (``backward_double_quant`` of its authors' configs)
    "tetrajet2": (DOUBLE, DOUBLE, NONE, *(DOUBLE_SR, DOUBLE_SR, RHT16) * 2),
    # arXiv:2603.10444 and 2602.02047: paper A's casts, split
    "averis": (*A_FORWARD, NV_SR, NV_2D, NONE, NV_SR, NV_1D, NONE),
    "hot_channels": TRUTH["nvfp4"],
    # arXiv:2610.00053: SR on dgrad's dy only, H32 with fixed signs on wgrad's operands
    "mxfp4_full_grid": (MX_FULL, MX_FULL_2D, NONE, MX_FULL_SR, MX_FULL_2D, NONE, MX_FULL, MX_FULL, NONE),
    "mxfp4_h32_full_grid": (
        MX_FULL, MX_FULL_2D, NONE, MX_FULL_SR, MX_FULL_2D, NONE, MX_FULL, MX_FULL, RHT32_FIXED,
    ),
    "nvfp4_local": (LOCAL, LOCAL_2D, NONE, LOCAL_SR, LOCAL_2D, NONE, LOCAL, LOCAL, NONE),
    "nvfp4_local_h16": (LOCAL, LOCAL_2D, NONE, LOCAL_SR, LOCAL_2D, NONE, LOCAL, LOCAL, RHT16_FIXED),
    "operand_hybrid": (
        MX_FULL, MX_FULL_2D, NONE, LOCAL_SR, LOCAL_2D, NONE, MX_FULL, MX_FULL, RHT32_FIXED,
    ),
    # arXiv:2609.02846: SR on dy of dgrad and wgrad, 2D weights, no rotation
    "ue5m3": (UE, UE_2D, NONE, UE_SR, UE_2D, NONE, UE_SR, UE, NONE),
    "ue5m3_b32": (UE32, UE32_2D, NONE, UE32_SR, UE32_2D, NONE, UE32_SR, UE32, NONE),
    # arXiv:2605.06067: no rotation
    "nvfp4_fixed": (*A_FORWARD, NV_SR, NV_2D, NONE, NV_SR, NV_1D, NONE),
    # Transformer Engine: one format a pass
    "nvfp4_mxfp8_bwd": (*A_FORWARD, *(MXFP8, MXFP8, NONE) * 2),
    "mxfp8_nvfp4_bwd": (MXFP8, MXFP8, NONE, *A_BACKWARD),
    "nvfp4_qk_mxfp8": TRUTH["nvfp4"],
    "fp8_delayed": TRUTH["fp8"],
    "mxfp6": (E2M3, E2M3, NONE, *(E3M2, E2M3, NONE) * 2),
}  # fmt: skip
# What a cast is made of, beside its table: operands, and the field that is not the default.
_COPIES = {("dgrad", "w"): {"source": "forward"}, ("wgrad", "x"): {"source": "forward"}}
ELSE = {
    "quartet2": _COPIES,
    "tetrajet2": _COPIES,
    "averis": {
        place: {"split": "mean"}
        for place in (("fprop", "x"), ("dgrad", "dy"), ("wgrad", "dy"), ("wgrad", "x"))
    },
    "hot_channels": {("fprop", o): {"split": "channels", "channels": 0.09} for o in "xw"},
    "nvfp4_fixed": {
        place: {"amax": "fixed"}
        for place in (("fprop", "x"), ("fprop", "w"), ("dgrad", "w"), ("wgrad", "x"))
    },
    "ue5m3": {place: {"amax": "held", "amax_steps": 50} for place in EVERY},
    "ue5m3_b32": {place: {"amax": "held", "amax_steps": 50} for place in EVERY},
    "fp8_delayed": {place: {"amax": "delayed", "amax_steps": 16} for place in EVERY},
}
# (blocks of 62 that stay in BF16, modules): arXiv:2509.25149 keeps the first 2 and the last 8 of 62.
PAPER_A = (["0:2", "54:"], ())
KEPT = {
    name: PAPER_A
    for name in TRUTH
    if name.startswith(("nvfp4", "four_over_six", "mxfp8_nvfp4"))
    or name in ("int4", "averis", "hot_channels")
}
KEPT |= {
    "nvfp4_all": ([], ()),
    "nvfp4_fixed": ([], ()),
    "nvfp4_local": ([], ()),
    "nvfp4_local_h16": ([], ()),
    "nvfp4_mxfp8_bwd": ([], ()),
    "nvfp4_last4": (["54:"], ()),
    "nemotron3": (["53:"], ("*.linear_qkv", "*.linear_proj")),
}


# Transformer Engine's Float8CurrentScaling splits its accumulator in dgrad and wgrad; the sums of MXFP4
# that FP8 carries are fast where the target of its speed asks for it, and never those of gradients of w.
H16_LIKE = (
    "mxfp4_h16", "mxfp4_random_h16", "mxfp4_h32", "mxfp4_h16_wgrad", "mxfp4_h16_2d", "mxfp4_deoscillated",
)  # fmt: skip
FAST = dict.fromkeys(("fp8", "fp8_delayed", "mxfp4_rht_sr_fp8"), ("fprop",))
FAST |= dict.fromkeys(H16_LIKE, ("fprop", "dgrad"))


# Period, window, ratio, start: the configs of arXiv:2510.27527's authors, and of AMD's port.
RESETS = {"tetrajet2": (200, 50, 8, 0.59), "mxfp4_deoscillated": (200, 0, 4, 0.12)}


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
    for gemm, operand, spec in plan.recipe.operands():
        told = ELSE.get(name, {}).get((gemm, operand), {})
        plain = {"ties": "even", "source": "tensor", "split": "none", "amax": "current"}
        assert {k: getattr(spec, k) for k in plain | told} == plain | told, (gemm, operand)


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_a_recipe_keeps_what_its_paper_keeps_and_nothing_switches_late(name: str) -> None:
    plan = shipped(name)
    assert plan.tail.at is None
    resets = plan.deoscillation
    found = (resets.period, resets.window, resets.ratio, resets.start)
    assert found == RESETS.get(name, (0, 0, 4, None))
    blocks = [r.blocks for r in plan.keep.rules(62) if r.blocks]
    assert (blocks, plan.keep.modules) == KEPT.get(name, ([], ()))


def test_queries_and_keys_follow_another_recipe_than_values() -> None:
    plan = shipped("nvfp4_qk_mxfp8")
    qkv = "self_attention.linear_qkv"
    assert plan.parts(0) == (f"{qkv}.qk", f"{qkv}.v")
    assert plan.at(0, f"{qkv}.qk", Progress()) == shipped("mxfp8").recipe
    assert plan.at(0, f"{qkv}.v", Progress()) == shipped("nvfp4").recipe


def test_knobs_that_belong_together_move_together() -> None:
    """Transformer Engine's vector has 16 signs that are never redrawn: any other rotation has its own."""
    for override in ("size=32", "resample=gemm", "kind=hadamard", "kind=none"):
        rotation = shipped("nvfp4", f"precision.wgrad.rotation.{override}").recipe.wgrad.rotation
        assert rotation.signs == "seed"
    assert Rotation(size=32, resample="gemm", dtype="fp32") == Rotation()


def test_the_covering_recipes_use_every_word() -> None:
    used = {name: words(shipped(name).recipe) for name in TRUTH}
    covered = set().union(*(used[name] for name in COVERING))
    assert not {word for name in TRUTH for word in used[name] - covered}


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
        cells = [cell.strip() for cell in re.split(r"  +", line)]
        shape = "-" if form == "bf16" else "tensor" if block == (0, 0) else f"{block[0]}x{block[1]}"
        said = scale if form != "bf16" else "-"
        cells[2] = cells[2].removesuffix(" of fprop's").split(",")[0]
        cells[5] = cells[5].split(",")[0]
        assert cells[:6] == [*place.split(), form, shape, rounding, said]
        rotation = getattr(recipe, place.split()[0]).rotation
        assert (cells[6:] == ["-"]) == (rotation.kind == "none")
        assert f"H{rotation.size}" in line or rotation.kind == "none"


def test_recipes_and_plans_are_values() -> None:
    """Equal when made twice, usable as keys, not to be changed: a cache may be keyed by them."""
    plans = [shipped(name) for name in TRUTH]
    again = [shipped.__wrapped__(name) for name in ("bf16", "nvfp4", "quartet2", "ue5m3")]
    assert set(again) <= set(plans)
    assert {hash(p) for p in plans} >= {hash(p) for p in again}
    assert len(set(plans)) == len(TRUTH)
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


def test_the_page_of_recipes_has_each_once() -> None:
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| .*\| .+ \|$", page, re.MULTILINE)
    assert sorted(listed) == sorted(groups()["precision"])
