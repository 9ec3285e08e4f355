"""Rules in YAML and on the command line: what they compose to, and what is refused in one line."""

from __future__ import annotations

import pytest

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.precision import GEMMS, Progress, Recipe

FC2 = "mlp.linear_fc2"
RULE = "precision.rules.r"


def recipe_of(name: str) -> Recipe:
    return plan_of(compose([f"precision={name}"])).recipe


def test_fc2_of_the_last_blocks_follows_two_recipes_from_30_percent_on() -> None:
    plan = plan_of(compose(["experiment=fc2_mixed", "model.num_layers=8"]))
    nvfp4, fp8, mxfp8 = (recipe_of(name) for name in ("nvfp4", "fp8", "mxfp8"))
    for layer in range(8):
        for linear in ("mlp.linear_fc1", FC2):
            for step in (0, 29, 30, 99):
                found = plan.at(layer, linear, Progress(step, 100))
                kept = layer == 7  # NVFP4's last block stays in BF16, where no rule says otherwise
                mixed = layer >= 4 and linear == FC2 and step >= 30
                assert found.fprop == (
                    fp8.fprop if mixed else Recipe().fprop if kept else nvfp4.fprop
                )
                assert found.dgrad == (
                    mxfp8.dgrad if mixed else Recipe().dgrad if kept else nvfp4.dgrad
                )
                assert found.wgrad == (Recipe().wgrad if kept else nvfp4.wgrad)


def test_every_key_of_a_rule_can_be_swept_and_a_new_rule_written() -> None:
    overrides = [
        f"{RULE}.recipe=fp8", f"{RULE}.linears=[head]", f"{RULE}.start='5 steps'",
        f"{RULE}.stop='2K tokens'", f"{RULE}.wgrad.x.format=mxfp8", f"{RULE}.wgrad.dy.format=mxfp8",
    ]  # fmt: skip
    plan = plan_of(compose(["precision=bf16", *overrides]))
    rule = plan.ordered[0]
    assert (rule.linears, rule.gemms) == (("head",), GEMMS)
    assert str(rule.start) == "5 steps" and str(rule.stop) == "2000 tokens"
    head = plan.at(None, "output_layer", Progress(5, 10, 1999))
    assert head.fprop.x.format == "fp8_e4m3" and head.wgrad.x.format == "mxfp8"
    changed = compose(["experiment=fc2_mixed", "precision.rules.fc2_dx.blocks=0"])
    assert [rule.blocks for rule in plan_of(changed).rules] == ["-4:", "0"]


def test_a_stored_config_says_what_its_rules_compute() -> None:
    rule = compose(["experiment=fc2_mixed"]).precision.rules["fc2_y"]
    assert rule.fprop.x.format == "fp8_e4m3"
    assert rule.dgrad is rule.wgrad is None


@pytest.mark.parametrize(
    "overrides, key, said",
    [
        ([f"{RULE}.recipe=fp9"], f"{RULE}.recipe", "no recipe; choose fp8"),
        ([f"{RULE}.linears=[fc2]"], f"{RULE}.recipe", "nothing to compute"),
        ([f"{RULE}.recipe=fp8", f"{RULE}.gemms=[forward]"], f"{RULE}.gemms", "fprop"),
        ([f"{RULE}.gemms=[dgrad]", f"{RULE}.fprop.x.format=nvfp4"], f"{RULE}.dgrad", "give it"),
        ([f"{RULE}.fprop.x.format=nvfp5"], f"{RULE}.fprop.x.format", "nvfp4"),
        ([f"{RULE}.fprop.x.format=nvfp4", f"{RULE}.fprop.w.format=mxfp4"], f"{RULE}.fprop", "family"),
        ([f"{RULE}.recipe=fp8", f"{RULE}.blocks=7"], RULE, "matches no linear"),
        ([f"{RULE}.recipe=fp8", f"{RULE}.start=7"], f"{RULE}.start", "500 steps"),
        ([f"{RULE}.when=7"], f"{RULE}.when", "no such key"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_meant_is_one_line(overrides: list[str], key: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        compose(overrides)
    text = str(refusal.value)
    assert text.startswith(key + ":") and said in text and "\n" not in text
