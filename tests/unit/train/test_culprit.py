"""The culprit: a planted fault is found first, and the printed rules meet the target."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.precision import Plan
from fp4pretrain.train.culprit import find_culprit
from fp4pretrain.train.culprit.parts import only, parts_of, quantized_casts, rules_text
from fp4pretrain.train.main import train

MODEL = (
    "model.num_layers=3 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=64 model.seq_length=32 data.mock=true parallel.device=cpu train.steps=3 "
    "train.micro_batch=2 train.global_batch=2 train.eval_interval=0 data.valid_tokens=2K logging=quiet"
).split()
# MXFP8 everywhere, and one layer's weight gradient in 4 bits.
PLANTED = [
    "precision=mxfp8",
    "precision.rules.planted.gemms=[wgrad]",
    "precision.rules.planted.recipe=mxfp4_h16",
    "precision.rules.planted.blocks=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("culprit") / "run"
    train(compose([*MODEL, *PLANTED, f"run_dir={path}"]))
    return path


def test_a_planted_fault_is_found_first(run: Path) -> None:
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    found = find_culprit(run, kinds=("gemm", "operand", "linear", "layer", "cell"), batches=3)
    first = {kind: ranked[0] for kind, ranked in found.ranked.items()}
    assert first["gemm"].part == "wgrad"
    assert first["layer"].part == "layer 1"
    assert first["cell"].part == "layer 1 wgrad"
    second = found.ranked["cell"][1]
    assert first["cell"].gradient_interval.low > second.gradient_interval.high
    assert first["cell"].loss == 0  # weight gradients change no loss
    assert {one.part for one in found.ranked["gemm"] if one.loss != 0} == {"fprop"}
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files


def test_the_rules_of_a_fix_keep_the_fault_and_meet_the_target(run: Path) -> None:
    target = 0.7 * find_culprit(run, kinds=("gemm",), batches=2).whole.gradient
    fix = find_culprit(run, kinds=("gemm",), batches=2, target=target).fix
    assert fix is not None and fix.cells[0] == "layer 1 wgrad"
    assert fix.after.gradient <= target < fix.before.gradient
    # the rules as printed, behind those of the run, leave the other casts alone
    precision = OmegaConf.load(run / "config.yaml").precision
    overrides = [*MODEL, *PLANTED]
    for name, rule in yaml.safe_load(fix.rules)["precision"]["rules"].items():
        for key, value in rule.items():
            text = f"[{','.join(value)}]" if isinstance(value, list) else f"'{value}'"
            overrides.append(f"precision.rules.{name}.{key}={text}")
    before = set(quantized_casts(plan_of(compose([*MODEL, *PLANTED]))))
    after = set(quantized_casts(plan_of(compose(overrides))))
    assert {cast.part("cell") for cast in before - after} == set(fix.cells)
    assert precision.name.startswith("mxfp8")


def test_a_bf16_run_needs_a_recipe(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantizes nothing"):
        find_culprit(run, precision="bf16")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        find_culprit(tmp_path)


def test_parts_cover_every_cast_once_and_quantize_it_alone() -> None:
    plan: Plan = plan_of(compose(["precision=nvfp4", "model.num_layers=3"]))
    casts = quantized_casts(plan)
    for kind in ("gemm", "operand", "linear", "layer", "cell"):
        parts = parts_of(casts, kind)
        assert sorted(map(str, casts)) == sorted(str(c) for part in parts.values() for c in part)
    alone = only(plan.recipe, lambda gemm, operand: (gemm, operand) == ("wgrad", "x"))
    assert [(g, o) for g, o, spec in alone.operands() if spec.quantized] == [("wgrad", "x")]
    assert alone.wgrad.rotation == plan.recipe.wgrad.rotation
    assert not alone.fprop.rotation.active


def test_neighbouring_layers_are_one_rule() -> None:
    cells = ["layer 2 wgrad", "layer 0 fprop", "layer 3 wgrad", "head fprop", "layer 7 wgrad"]
    rules = yaml.safe_load(rules_text(cells, remark="-"))["precision"]["rules"]
    assert {name: (r.get("blocks"), r["gemms"]) for name, r in rules.items()} == {
        "keep_fprop_0": ("0:1", ["fprop"]),
        "keep_fprop_head": (None, ["fprop"]),
        "keep_wgrad_2": ("2:4", ["wgrad"]),
        "keep_wgrad_7": ("7:8", ["wgrad"]),
    }
