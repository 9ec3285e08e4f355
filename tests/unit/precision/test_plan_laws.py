"""The plan: which linear is quantized when, what is refused and what is only said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.precision import (
    BF16,
    Deoscillation,
    Dgrad,
    Fprop,
    Keep,
    Plan,
    Progress,
    Recipe,
    Rotation,
    Rule,
    Tail,
    Wgrad,
    parse_point,
)

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
NV, NV_2D = QuantSpec("nvfp4"), QuantSpec("nvfp4", block="2d")
NV_SR = QuantSpec("nvfp4", rounding="stochastic")
MX, E4M3 = QuantSpec("mxfp4"), QuantSpec("fp8_e4m3")
FP8, FP8_1D = QuantSpec("fp8_e4m3", "row"), QuantSpec("fp8_e4m3", "1d")
H16 = Rotation("hadamard", 16)
NVFP4 = Recipe(Fprop(NV, NV_2D), Dgrad(NV_SR, NV_2D), Wgrad(NV_SR, NV, H16))


def kept(keep: Keep, layers: int) -> set[tuple[int, str]]:
    plan = Plan(NVFP4, layers, keep)
    return {(i, n) for i in range(layers) for n in LINEARS if plan.at(i, n, Progress()) is BF16}


def blocks(*indices: int) -> set[tuple[int, str]]:
    return {(i, name) for i in indices for name in LINEARS}


@pytest.mark.parametrize(
    "first, last, layers, expected",
    [
        (0, 0, 4, ()),
        (1, 1, 4, (0, 3)),
        (0, 3, 4, (1, 2, 3)),
        (2, 8, 62, (0, 1, 54, 55, 56, 57, 58, 59, 60, 61)),
        (0.033, 0.13, 62, (0, 1, 54, 55, 56, 57, 58, 59, 60, 61)),
        (0.033, 0.13, 20, (0, 17, 18, 19)),
        (0.033, 0.13, 4, (3,)),
        (0.25, 0.5, 4, (0, 2, 3)),
        (0, 0.125, 4, (3,)),  # half a block is rounded up
        (0, 0.124, 4, ()),
        (0.4, 1, 4, (0, 1, 3)),  # a fraction in front, a number behind
    ],
)
def test_keep_counts_global_blocks_or_a_share_of_them(
    first: float, last: float, layers: int, expected: tuple[int, ...]
) -> None:
    assert kept(Keep(first, last), layers) == blocks(*expected)


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (("*.linear_qkv",), {(i, LINEARS[0]) for i in range(12)}),
        (("layers.1.*",), blocks(1)),  # not layers 10 and 11
        (("layers.3.mlp.linear_fc2",), {(3, LINEARS[3])}),
        (("layers.[02].self_attention.*",), {(i, n) for i in (0, 2) for n in LINEARS[:2]}),
        (("layers.1?.*", "layers.0.mlp.*"), blocks(10, 11) | {(0, n) for n in LINEARS[2:]}),
    ],
)
def test_module_patterns_match_whole_global_names(
    patterns: tuple[str, ...], expected: set[tuple[int, str]]
) -> None:
    assert kept(Keep(modules=patterns), 12) == expected


def test_blocks_and_patterns_add_up() -> None:
    found = kept(Keep(1, 0, ("*.linear_proj",)), 3)
    assert found == blocks(0) | {(i, LINEARS[1]) for i in range(3)}


def test_a_kept_linear_is_bf16_throughout_and_the_others_follow_the_recipe() -> None:
    plan = Plan(NVFP4, 4, Keep(0, 1), Tail(0.5, ("fprop",)))
    for step in (0, 49, 50, 100):
        assert plan.at(3, LINEARS[0], Progress(step, 100)) == BF16
        expected = Recipe(dgrad=NVFP4.dgrad, wgrad=NVFP4.wgrad) if step >= 50 else NVFP4
        assert plan.at(0, LINEARS[0], Progress(step, 100)) == expected
    assert plan.recipes() == [NVFP4, Recipe(dgrad=NVFP4.dgrad, wgrad=NVFP4.wgrad), BF16]


@pytest.mark.parametrize("at", [0.0, 0.1, 0.3, 0.82, 1.0])
@pytest.mark.parametrize("steps", [10, 50, 100, 300, 100_000])
def test_the_switch_comes_with_exactly_the_step_that_reaches_it(at: float, steps: int) -> None:
    """The first switched step is ceil(at * steps), whatever floating point makes of step / steps."""
    plan = Plan(NVFP4, 4, tail=Tail(at))
    first = math.ceil(round(at * 100) * steps / 100)  # exact: at has two digits, steps is small
    switched = Recipe(dgrad=NVFP4.dgrad, wgrad=NVFP4.wgrad)
    assert plan.at(0, LINEARS[0], Progress(first, steps)) == switched
    if first:
        assert plan.at(0, LINEARS[0], Progress(first - 1, steps)) == NVFP4


@pytest.mark.parametrize(
    "gemms, quantized",
    [
        (("fprop",), {"dgrad", "wgrad"}),
        (("dgrad", "wgrad"), {"fprop"}),
        (("fprop", "dgrad", "wgrad"), set()),
    ],
)
def test_the_late_switch_takes_whole_gemms_rotation_included(
    gemms: tuple[str, ...], quantized: set[str]
) -> None:
    late = Plan(NVFP4, 4, tail=Tail(0.8, gemms)).at(0, LINEARS[0], Progress(9, 10))
    assert {g for g, _, spec in late.operands() if spec.quantized} == quantized
    for gemm in ("fprop", "dgrad", "wgrad"):
        expected = getattr(NVFP4 if gemm in quantized else BF16, gemm)
        assert late.gemm(gemm) == expected


@pytest.mark.parametrize(
    "make, key, cure",
    [
        (lambda: Keep(first_blocks=-1), "precision.keep.first_blocks", "number of blocks"),
        (lambda: Keep(last_blocks=1.5), "precision.keep.last_blocks", "fraction"),
        (lambda: Keep(last_blocks=math.nan), "precision.keep.last_blocks", "fraction"),
        (lambda: Keep(last_blocks=math.inf), "precision.keep.last_blocks", "fraction"),
        (lambda: Tail(at=1.1), "precision.tail.at", "0 to 1"),
        (lambda: Tail(at=math.nan), "precision.tail.at", "0 to 1"),
        (lambda: Tail(at=0.5, to_bf16=("fwd",)), "precision.tail.to_bf16", "fprop, dgrad, wgrad"),
        (lambda: Tail(at=0.5, to_bf16=()), "precision.tail.to_bf16", "precision.tail.at=null"),
        (lambda: Plan(NVFP4, 4, Keep(2, 2)), "precision.keep", "keep fewer"),
        (lambda: Plan(NVFP4, 4, Keep(9, 0)), "precision.keep", "keep fewer"),
        (lambda: Plan(NVFP4, 4, Keep(modules=("*",))), "precision.keep", "keep fewer"),
        (lambda: Plan(NVFP4, 4, Keep(modules=("*.qkv",))), "precision.keep.modules", "layers.0."),
        (lambda: Plan(NVFP4, 4, Keep(modules=("layers.4.*",))), "precision.keep.modules", "to 3"),
        (
            lambda: Plan(NVFP4, 4, rules=(Rule("a", BF16, blocks="4:"),)),
            "precision.rules.a",
            "to 3",
        ),
        (lambda: Rule("a", BF16, gemms=()), "precision.rules.a.gemms", "fprop, dgrad, wgrad"),
        (lambda: Rule("a", BF16, linears=("mlp",)), "precision.rules.a.linears", "head"),
        (lambda: Rule("a", BF16, blocks="last"), "precision.rules.a.blocks", "-4:"),
        (
            lambda: Rule("a", BF16, start=parse_point("s", 0.5), stop=parse_point("s", 0.5)),
            "precision.rules.a.stop",
            "raise",
        ),
        (
            lambda: parse_point("precision.rules.a.start", "2 weeks"),
            "precision.rules.a.start",
            "2B tokens",
        ),
        (lambda: Recipe(Fprop(NV, MX)), "precision.fprop", "one family"),
        (lambda: Recipe(dgrad=Dgrad(E4M3, MX)), "precision.dgrad", "one family"),
        (lambda: Recipe(Fprop(x=NV_2D)), "precision.fprop.x.block", "use 1d"),
        (lambda: Recipe(wgrad=Wgrad(NV, NV_2D)), "precision.wgrad.x.block", "use 1d"),
        (lambda: Recipe(wgrad=Wgrad(rotation=H16)), "precision.wgrad.rotation", "kind: none"),
        (lambda: Rotation("givens"), "rotation.kind", "hadamard"),
        (lambda: Rotation("hadamard", 17), "rotation.size", "16, 32, 64, 128"),
        (lambda: Rotation(resample="daily"), "rotation.resample", "never"),
        (lambda: Rotation(signs="dice"), "rotation.signs", "te"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused_in_one_line(make, key: str, cure: str) -> None:
    with pytest.raises(UserError) as refusal:
        make()
    text = str(refusal.value)
    assert text.startswith(key + ":")
    assert cure in text.split(":", 1)[1]
    assert "\n" not in text


def test_a_bf16_operand_may_meet_a_quantized_one_and_a_bf16_plan_may_keep_everything() -> None:
    assert Recipe(dgrad=Dgrad(NV, rotation=H16)).quantized
    Plan(BF16, 4, Keep(2, 2))


@pytest.mark.parametrize(
    "recipe, keys",
    [
        (NVFP4, []),
        (Recipe(Fprop(NV_SR, NV)), ["precision.fprop.x.rounding"]),
        (Recipe(Fprop(NV, NV_SR)), ["precision.fprop.w.rounding"]),
        (Recipe(Fprop(NV, NV_2D, H16)), ["precision.fprop.w.block"]),
        (Recipe(dgrad=Dgrad(NV_SR, NV_2D, H16)), ["precision.dgrad.w.block"]),
        (Recipe(Fprop(NV, NV, fast_accum=True)), ["precision.fprop.fast_accum"]),
        (Recipe(wgrad=Wgrad(fast_accum=True)), ["precision.wgrad.fast_accum"]),
        (Recipe(Fprop(FP8_1D, FP8_1D, fast_accum=True)), ["precision.fprop.fast_accum"]),
        (Recipe(Fprop(FP8, FP8, fast_accum=True), Dgrad(MX, MX, fast_accum=True)), []),
    ],
)
def test_what_the_papers_found_harmful_is_said(recipe: Recipe, keys: list[str]) -> None:
    said = recipe.warnings()
    assert [line.split(": ")[0] for line in said] == keys
    assert not any("\n" in line for line in said)


@pytest.mark.parametrize(
    "recipe, shard, key",
    [
        # what column parallelism splits: dgrad contracts over n, tiles of w lie along n
        (Recipe(dgrad=Dgrad(dy=NV)), dict(n=(24,), k=None), "precision.dgrad.dy.block"),
        (Recipe(dgrad=Dgrad(w=NV)), dict(n=(64, 24), k=None), "precision.dgrad.dy.block"),
        (Recipe(Fprop(w=NV_2D)), dict(n=(24,), k=None), "precision.fprop.w.block"),
        (Recipe(dgrad=Dgrad(dy=NV, rotation=Rotation("hadamard", 64))), dict(n=(32,), k=None),
         "precision.dgrad.rotation.size"),
        # what row parallelism splits: fprop contracts over k
        (Recipe(Fprop(x=NV)), dict(n=(), k=24), "precision.fprop.x.block"),
        (Recipe(Fprop(w=MX)), dict(n=(), k=48), "precision.fprop.x.block"),
        (Recipe(dgrad=Dgrad(w=NV_2D)), dict(n=(), k=24), "precision.dgrad.w.block"),
    ],
)  # fmt: skip
def test_a_shard_that_ends_inside_a_block_is_refused(recipe: Recipe, shard: dict, key: str) -> None:
    plan = Plan(recipe, 4)
    plan.check_shards("mlp.linear_fc1", n=(128, 256), k=384)
    with pytest.raises(UserError) as refusal:
        plan.check_shards("mlp.linear_fc1", **shard)
    text = str(refusal.value)
    assert text.startswith(key + ":")
    assert "mlp.linear_fc1" in text and "parallel.tensor" in text and "\n" not in text


def test_what_no_block_lies_along_may_be_split_anywhere() -> None:
    per_tensor = Recipe(Fprop(E4M3, E4M3), Dgrad(E4M3, E4M3), Wgrad(E4M3, E4M3))
    Plan(per_tensor, 4).check_shards("mlp.linear_fc1", n=(5,), k=3)
    # blocks along tokens alone: tokens are not split
    Plan(Recipe(wgrad=Wgrad(NV, NV)), 4).check_shards("mlp.linear_fc1", n=(5,), k=3)


FP8_ALL = Recipe(Fprop(E4M3, E4M3), Dgrad(E4M3, E4M3), Wgrad(E4M3, E4M3))


def test_the_last_rule_that_matches_wins_gemm_by_gemm() -> None:
    """keep, then the rules in their order, then tail; what a rule does not name it leaves alone."""
    rules = (
        Rule("fc2", FP8_ALL, gemms=("fprop", "dgrad"), linears=("fc2",), blocks="-2:"),
        Rule("late", BF16, gemms=("dgrad",), linears=("fc2",), start=parse_point("k", 0.5)),
        Rule("head", FP8_ALL, gemms=("wgrad",), linears=("head",)),
    )
    plan = Plan(NVFP4, 4, Keep(last_blocks=1), Tail(0.8, ("fprop",)), rules)

    def formats(layer: int | None, linear: str, step: int) -> list[str]:
        recipe = plan.at(layer, linear, Progress(step, 10))
        return [recipe.gemm(g).specs[0].format for g in ("fprop", "dgrad", "wgrad")]

    assert formats(0, LINEARS[3], 0) == ["nvfp4", "nvfp4", "nvfp4"]
    assert formats(2, LINEARS[3], 0) == ["fp8_e4m3", "fp8_e4m3", "nvfp4"]
    assert formats(3, LINEARS[3], 0) == ["fp8_e4m3", "fp8_e4m3", "bf16"]  # over keep
    assert formats(2, LINEARS[3], 5) == ["fp8_e4m3", "bf16", "nvfp4"]
    assert formats(2, LINEARS[3], 8) == ["bf16", "bf16", "nvfp4"]  # tail comes last
    assert formats(2, LINEARS[2], 8) == ["bf16", "nvfp4", "nvfp4"]
    assert formats(None, "output_layer", 0) == ["bf16", "bf16", "fp8_e4m3"]
    running = {plan.at(*place, Progress(s, 10)) for place in plan.linears() for s in range(11)}
    assert running <= set(plan.recipes())
    assert all(recipe is recipe.interned() for recipe in running)


@pytest.mark.parametrize("blocks, expected", [
    ("3", {3}), ("-1", {5}), ("0:2", {0, 1}), ("-2:", {4, 5}), (":", set(range(6))), ("9:", set()),
])  # fmt: skip
def test_blocks_are_python_s_slices(blocks: str, expected: set[int]) -> None:
    rule = Rule("r", FP8_ALL, blocks=blocks)
    assert {i for i in range(6) if rule.covers(i, LINEARS[0], 6)} == expected
    assert not rule.covers(None, "output_layer", 6)


@pytest.mark.parametrize("value, progress, reached", [
    (0.5, Progress(5, 10, 0), True), (0.5, Progress(4, 10, 0), False),
    ("300 steps", Progress(300, 1000, 0), True), ("300 steps", Progress(299, 1000, 0), False),
    ("2M tokens", Progress(1, 10, 2_000_000), True), ("1.5B tokens", Progress(9, 9, 10), False),
    ("0.25", Progress(1, 4, 0), True),
])  # fmt: skip
def test_a_moment_is_a_fraction_a_step_or_tokens(value, progress: Progress, reached: bool) -> None:
    point = parse_point("key", value)
    assert point is not None and point.reached(progress) == reached


def test_the_printed_plan_counts_and_names_what_is_kept() -> None:
    text = str(Plan(NVFP4, 4, Keep(0, 1, ("layers.0.mlp.linear_fc2",)), Tail(0.82)))
    assert "11 of 16 linears of the blocks are quantized at the start" in text
    assert "rule keep.last_blocks: blocks 3:" in text
    assert "rule tail: all blocks, qkv/proj/fc1/fc2, fprop, from 0.82 of the run: BF16" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert rows == [
        ["0", "recipe", "recipe", "recipe", "BF16"],
        ["1", *["recipe"] * 4],
        ["2", *["recipe"] * 4],
        ["3", *["BF16"] * 4],
    ]


QKV = LINEARS[0]
Q_MX, K_MX, QK_MX = (Rule("r", Recipe(Fprop(MX, MX)), linears=names) for names in ("q", "k", "qk"))


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ([], ["qkv"]),
        ([Q_MX], ["q", "kv"]),
        ([Q_MX, replace(K_MX, name="s")], ["qk", "v"]),  # two rules, one recipe
        ([QK_MX, replace(Q_MX, name="s", recipe=BF16)], ["q", "k", "v"]),
        ([replace(Q_MX, linears=("q", "v"))], ["qv", "k"]),
        ([replace(Q_MX, linears=("q", "k", "v"))], ["qkv"]),
        ([replace(Q_MX, recipe=NVFP4)], ["qkv"]),  # what they follow anyway
        ([replace(Q_MX, modules=("*.linear_qkv",), linears=("qkv",))], ["qkv"]),
        ([replace(Q_MX, modules=("*.linear_qkv.[kv]",), linears=("qkv",))], ["q", "kv"]),
        # apart for a part of the run: apart for all of it
        ([replace(Q_MX, start=parse_point("k", 0.5))], ["q", "kv"]),
    ],
)
def test_projections_are_parts_of_the_plan_where_their_recipes_ever_differ(rules, parts) -> None:
    plan = Plan(NVFP4, 2, rules=tuple(rules))
    assert plan.parts(1) == tuple(QKV if p == "qkv" else f"{QKV}.{p}" for p in parts)
    in_layer = [linear for layer, linear in plan.linears() if layer == 1]
    assert in_layer == [*plan.parts(1), *LINEARS[1:]]


def test_a_layer_is_divided_alone_and_each_part_has_its_recipe() -> None:
    plan = Plan(NVFP4, 3, Keep(1), rules=(replace(QK_MX, blocks="1"),))
    assert [plan.parts(layer) for layer in range(3)] == [
        (QKV,), (f"{QKV}.qk", f"{QKV}.v"), (QKV,),
    ]  # fmt: skip
    mixed = NVFP4.replaced(("fprop", "dgrad", "wgrad"), QK_MX.recipe)
    assert plan.at(1, f"{QKV}.qk", Progress()) == mixed
    assert plan.at(1, f"{QKV}.v", Progress()) == NVFP4
    assert set(plan.recipes()) == {BF16, mixed, NVFP4}
    assert "9 of 13 linears of the blocks" in str(plan)
    assert "qk mxfp4/bf16, v recipe" in str(plan)


def test_a_part_s_shard_is_checked_as_its_own_matrix() -> None:
    plan = Plan(NVFP4, 2, rules=(replace(QK_MX, recipe=FP8_ALL),))
    plan.check_shards(QKV, n=(24,), k=None)  # nobody's: the matrix is divided
    plan.check_shards(f"{QKV}.qk", n=(24,), k=None)
    with pytest.raises(UserError, match=r"24 features of self_attention.linear_qkv.v,"):
        plan.check_shards(f"{QKV}.v", n=(24,), k=None)


def test_weights_are_set_onto_their_casts_as_whole_matrices_alone() -> None:
    with pytest.raises(UserError, match=r"^precision.deoscillation.period: .* name qkv"):
        Plan(NVFP4, 2, rules=(QK_MX,), deoscillation=Deoscillation(period=10))
