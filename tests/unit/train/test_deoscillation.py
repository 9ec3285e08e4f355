"""Swinging weights: who is reset, when, in the masters too, and exactly again after a restart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join, leave, pick_device
from fp4pretrain.precision import Deoscillation, Progress
from fp4pretrain.train.main import train
from fp4pretrain.train.trainer import Trainer, build_trainer

SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.ffn_hidden_size=96 "
    "model.seq_length=32 train.micro_batch=2 train.global_batch=2 train.steps=9 train.log_interval=1 "
    "train.eval_interval=0 data.valid_tokens=128 data.mock=true logging=quiet optim.warmup=0 "
    "optim.decay=0 logging.wandb.mode=disabled precision=nvfp4 precision.keep.last_blocks=0 "
    "parallel.device=cpu"
).split()
OPTIMIZERS = {
    "distributed": [],
    "plain": ["parallel.distributed_optimizer=false"],
    "FP32 weights": ["optim.params_dtype=fp32"],
}


@pytest.fixture(autouse=True)
def _groups() -> Any:
    yield
    leave()


def build(*overrides: str) -> Trainer:
    config = compose([*SMALL, *overrides])
    world = join(device=pick_device("cpu"), seed=config.seed)
    return build_trainer(config, world, check_layout(config, 1))


def masters(trainer: Trainer) -> list[torch.Tensor]:
    """Every FP32 master there is, copied."""
    parts = trainer.optimizer.chained_optimizers
    groups = [group for part in parts for group in part.optimizer.param_groups]
    return [master.detach().clone() for group in groups for master in group["params"]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_swings_is_set_onto_its_cast_and_nothing_else_moves(optimizer: str) -> None:
    """MXFP4 scales of 1: 0.25 is the boundary between 0 and 0.5, and 0.26 goes to 0.5. One weight goes
    to and fro over it, one goes its way through two codes, one stays."""
    trainer = build(
        "precision=mxfp4_h16_wgrad",
        "precision.fprop.w.scale=floor",
        *OPTIMIZERS[optimizer],
    )
    linear = trainer.binding.linears[0][2]
    weight = linear.weight
    weight.data.fill_(0.125)
    weight.data[:, ::32] = 4.0  # of every block's 32: the scale is 1
    trainer.optimizer.reload_model_params()
    trainer.paths.begin()
    swinging, walking = (3, 5), (4, 6)
    for step in range(4):
        weight.data[swinging] = 0.25390625 if step % 2 == 0 else 0.24609375
        weight.data[walking] = 0.5 + step
        trainer.paths.step()
    trainer.optimizer.reload_model_params()
    before, others = weight.detach().clone(), masters(trainer)
    # the swing: 0.125 -> .254 -> .246 -> .254 -> .246 moved 0.152, its cast 0 -> .5 -> 0 -> .5 -> 0: 2.0
    count, elements = trainer.paths.reset(trainer.optimizer, ratio=13.0)
    assert count == 1 and elements == sum(
        one.weight.numel() for layer, _, one in trainer.binding.linears if layer is not None
    )
    expected = before.clone()
    expected[swinging] = 0.0
    assert torch.equal(weight, expected) and not trainer.paths.open
    changed = [
        (old[old != new].tolist(), new[old != new].tolist())
        for old, new in zip(others, masters(trainer), strict=True)
        if not torch.equal(old, new)
    ]
    assert changed == [([0.24609375], [0.0])]


def test_a_ratio_that_is_not_reached_resets_nothing() -> None:
    trainer = build()
    weight = trainer.binding.linears[0][2].weight
    trainer.paths.begin()
    trainer.paths.step()  # nothing moved: 0 over 0 is no swing
    assert trainer.paths.reset(trainer.optimizer, ratio=4.0)[0] == 0
    trainer.paths.begin()
    weight.data.mul_(2.0)  # and its casts, exactly
    trainer.paths.step()
    assert trainer.paths.reset(trainer.optimizer, ratio=4.0)[0] == 0


@pytest.mark.parametrize(
    ("given", "opened", "closed"),
    [
        ({"period": 4}, [0, 4, 8], [4, 8, 12]),
        ({"period": 4, "window": 3}, [1, 5, 9], [4, 8, 12]),
        ({"period": 4, "window": 1, "start": 0.5}, [7, 11], [4, 8, 12]),
        ({"period": 4, "start": "3 steps"}, [4, 8], [4, 8, 12]),
        ({}, [], []),
    ],
    ids=str,
)
def test_windows_open_and_close(given: dict, opened: list[int], closed: list[int]) -> None:
    plan = Deoscillation(**given)
    steps = range(13)
    assert [s for s in steps if plan.opens(Progress(s, 12)) and s < 12] == opened
    assert [s for s in steps if plan.closes(s)] == closed
    assert bool(plan) == bool(given)


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row.get(key) for key in ("event", "step", "loss", "grad_norm", "reset_share")}
        for row in found
        if row["event"] in ("train", "deoscillation")
    ]


def test_a_run_cut_off_in_a_window_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Also where the recipe changes inside of the window that is cut."""
    run = [*SMALL, "checkpoint.interval=3", "checkpoint.keep_last=9"]
    run += ["precision.deoscillation.period=4", "precision.deoscillation.ratio=2"]
    run += ["precision.rules.a.recipe=nvfp4_1d", "precision.rules.a.gemms=[fprop]"]
    run += ["precision.rules.a.linears=[fc1]", "precision.rules.a.start='6 steps'"]
    train(compose([*run, f"run_dir={tmp_path}/whole"]))
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole if row["event"] == "deoscillation"] == [4, 8]
    assert all(row["reset_share"] > 0 for row in whole if row["event"] == "deoscillation")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in tmp_path.glob("cut/checkpoints/step_0000000[79]"):
        shutil.rmtree(later)
    (tmp_path / "cut/checkpoints/latest").write_text("step_00000006\n")
    train(compose([*run, f"run_dir={tmp_path}/cut", "resume=auto"]))
    assert rows(tmp_path / "cut") == whole


def test_a_run_that_no_longer_asks_lets_the_paths_go(tmp_path: Path) -> None:
    run = [*SMALL, "checkpoint.interval=3", f"run_dir={tmp_path}", "train.steps=6"]
    train(compose([*run, "precision.deoscillation.period=4"]))
    shutil.rmtree(tmp_path / "checkpoints/step_00000006")
    train(compose([*run, "resume=auto", "resume_with=[precision]"]))
    assert [row["step"] for row in rows(tmp_path)][-1] == 6


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["precision=mxfp4_h16"], r"precision.fprop.rotation.kind: weights are rotated before .* "
         r"set precision.deoscillation.period=0"),
        (["precision=mxfp4_bwd"], r"precision.fprop.w.format: weights are not quantized"),
        (["precision.fprop.w.rounding=stochastic"], r"precision.fprop.w.rounding: stochastic"),
        (["precision=ue5m3"], r"precision.fprop.w.amax: with held amaxes"),
        (["precision.deoscillation.window=9"], r"deoscillation.window: 9 is not within a period of 8"),
        (["precision.deoscillation.ratio=0"], r"deoscillation.ratio: 0.0 is not above 0"),
        (["precision.deoscillation.period=-1"], r"deoscillation.period: -1 is negative"),
        (["precision.deoscillation.start=2"], r"deoscillation.start: 2 is no fraction"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line(overrides: list[str], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        plan_of(compose([*SMALL, "precision.deoscillation.period=8", *overrides]))
