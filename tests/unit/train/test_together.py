"""What the runs of one command share, before any of them is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp4pretrain.config import RunConfig, compose, plan_of
from fp4pretrain.train.sinks import tags
from fp4pretrain.train.together import together


def run(recipe: str, *overrides: str) -> RunConfig:
    config = compose([f"precision={recipe}", *overrides])
    return replace(config, run_dir=f"runs/{recipe}-seed{config.seed}")


def named(config: RunConfig) -> tuple[str | None, str | None]:
    w = config.logging.wandb
    return w.group, w.job_type


@pytest.fixture(autouse=True)
def _no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_beside_its_baseline_shares_its_group_and_is_held_against_it() -> None:
    ((base, one), (same, other)) = together(
        [[run("fp8"), run("nvfp4")], [run("fp8"), run("mxfp4_h16")]]
    )
    groups = {named(config)[0] for config in (base, one, same, other)}
    assert len(groups) == 1 and groups != {None}
    assert [named(config)[1] for config in (base, one, other)] == ["baseline", "train", "train"]
    assert base == same  # trained once
    assert (base.baseline, one.baseline, other.baseline) == (None, *["runs/fp8-seed1234"] * 2)


def test_a_sweep_given_again_goes_on_in_its_group_and_another_one_does_not() -> None:
    sweep = [[run("fp8")], [run("nvfp4")]]
    first, again = together(sweep), together(sweep[::-1])
    more = together([*sweep, [run("bf16")]])
    found = [pairs[0][0].logging.wandb.group for pairs in (first, again, more)]
    assert found[0] == found[1] != found[2]


def test_what_a_user_or_wandbs_own_variables_say_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("logging.wandb.group=mine", "logging.wandb.job_type=probe")
    ((one,), (other,)) = together([[run("fp8", *given)], [run("nvfp4", *given)]])
    assert named(one) == named(other) == ("mine", "probe")
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    monkeypatch.setenv("WANDB_JOB_TYPE", "theirs")
    assert named(together([[run("fp8")], [run("nvfp4")]])[0][0]) == (None, None)


def test_a_run_alone_is_no_group() -> None:
    assert together([[run("fp8")]]) == [[run("fp8")]]


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("bf16", ["bf16"]),
        ("nvfp4", ["nvfp4", "RHT16", "stochastic"]),
        ("mxfp4_h16", ["mxfp4", "H16"]),
        ("fp8", ["fp8_e4m3", "fp8_e5m2"]),
    ],
)
def test_tags_name_formats_rotations_and_roundings(recipe: str, expected: list[str]) -> None:
    assert tags(plan_of(compose([f"precision={recipe}"]))) == expected


def test_a_late_switch_is_a_tag() -> None:
    plan = plan_of(
        compose(["precision=nvfp4", "precision.tail.at=0.8", "precision.tail.to_bf16=[fprop]"])
    )
    assert "switches" in tags(plan)
