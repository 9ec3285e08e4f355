"""Every preset composes, and the experiments say what their names promise."""

from __future__ import annotations

import pytest

from fp4pretrain.checks import schedule_steps
from fp4pretrain.config import compose, plan_of
from fp4pretrain.model.layout import check_layout
from fp4pretrain.precision import Progress
from fp4pretrain.presets import groups

PRESETS = [(group, option) for group, options in groups().items() for option in options]
NEEDS = {("data", "indexed"): ["data.path=some/prefix"]}


def test_no_group_is_empty() -> None:
    assert {group for group, _ in PRESETS} == {
        *("data", "experiment", "logging", "model", "optim", "parallel", "precision", "train"),
    }


@pytest.mark.parametrize(("group", "option"), PRESETS)
def test_a_preset_composes_and_fits_some_ranks(group: str, option: str) -> None:
    wide = ["model=llama3_8b"] if group == "parallel" else []  # a model that eight ranks can share
    config = compose([f"{group}={option}", *wide, *NEEDS.get((group, option), [])])
    ranks = config.parallel.tensor * config.parallel.pipeline
    assert check_layout(config, ranks).data == 1


@pytest.mark.parametrize("recipe", ["nvfp4", "tetrajet2"])  # the latter has the longest blocks
@pytest.mark.parametrize("model", groups()["model"])
def test_a_recipe_fits_every_model(recipe: str, model: str) -> None:
    config = compose([f"precision={recipe}", f"model={model}"])
    assert check_layout(config, 1).data == 1
    assert config.precision.name == recipe


@pytest.mark.parametrize("name", groups()["experiment"])
def test_an_experiments_keys_stand_above_the_defaults_and_below_the_command_line(name: str) -> None:
    config = compose([f"experiment={name}"])
    assert config.baseline is not None
    assert config.baseline != config.precision.name
    changed = compose([f"experiment={name}", "train.steps=77", "precision=fp8", "baseline=bf16"])
    assert (changed.train.steps, changed.precision.fprop.x.format) == (77, "fp8_e4m3")


def test_experiments_state_their_papers_numbers() -> None:
    quartet = compose(["experiment=quartet2_30m"])
    tokens = quartet.train.steps * quartet.train.global_batch * quartet.model.seq_length
    assert tokens / 30e6 == pytest.approx(25, rel=0.01)
    assert (quartet.optim.schedule, quartet.optim.lr, quartet.optim.warmup) == (
        "cosine",
        1.2e-3,
        0.1,
    )
    plan = plan_of(quartet)
    assert all(plan.at(i, "mlp.linear_fc1", Progress()).quantized for i in range(6))

    b = compose(["experiment=paper_b_345m"])
    assert b.train.steps * b.train.global_batch * b.model.seq_length == pytest.approx(
        33e9, rel=1e-4
    )
    assert (b.precision.name, b.optim.lr, b.optim.min_lr) == ("mxfp4_rht_sr", 1.5e-4, 1e-5)

    c = compose(["experiment=full_grid_8b"])
    tokens = c.train.global_batch * c.model.seq_length
    assert tokens == pytest.approx(4.2e6, rel=0.01)
    assert c.train.steps * tokens == pytest.approx(160e9, rel=1e-4)
    assert (c.optim.lr, c.optim.min_lr, schedule_steps(c)[0]) == (3e-4, 3e-4, 2000)
    hundred = compose(["experiment=quartet2_100m"])
    assert hundred.train.steps * hundred.train.global_batch * 512 == pytest.approx(2.5e9, rel=0.01)

    late = plan_of(compose(["experiment=late_switch"]))
    before, after = (late.at(5, "mlp.linear_fc1", Progress(s, 100)) for s in (81, 82))
    assert before.fprop.x.format == "nvfp4"
    assert after.fprop.x.format == "bf16"
    assert after.wgrad == before.wgrad
