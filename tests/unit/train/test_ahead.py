"""Where hooks only read, a step begins before the one before it is read: the same run, and it stops as asked.

Only replayed steps begin ahead, and those need a GPU (tests/gpu/test_replay_cuda.py). Here plain steps are
let begin ahead, so that whole runs show what the loop, the hooks and the trainer make of it.
"""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ahead import steps_ahead
from records import curve, weights

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.train.hooks import Guard, Triggers
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.main import Stopped, train
from fp4pretrain.train.replay import Replays
from fp4pretrain.train.trainer import Trainer

RUN = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.ffn_hidden_size=96 "
    "model.seq_length=32 train.micro_batch=2 train.global_batch=2 train.steps=16 data.mock=true "
    "data.valid_tokens=64 train.log_interval=1 train.eval_interval=5 checkpoint.interval=8 "
    "checkpoint.asynchronous=false optim.warmup=2 logging=quiet logging.wandb.mode=disabled "
    "parallel.device=cpu"
).split()
RUNS = {
    "amaxes of the steps before, a switch": [
        "precision=fp8_delayed",
        "precision.tail.at=0.4",
        "precision.tail.to_bf16=[fprop]",
    ],
    "observed": ["precision=nvfp4", "observe.interval=6"],
}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let plain steps begin ahead. The steps that were read while the next one had begun."""
    monkeypatch.setattr(Replays, "whole", property(lambda self: True))
    return steps_ahead(monkeypatch)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_steps_begin_ahead_is_the_same_run(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders = tmp_path / "read at once", tmp_path / "ahead"
    train(compose([*RUN, *RUNS[name], f"run_dir={folders[0]}"]))
    ahead = request.getfixturevalue("ahead")
    train(compose([*RUN, *RUNS[name], f"run_dir={folders[1]}"]))
    assert curve(folders[1]) == curve(folders[0])
    for step in (8, 16):
        one, other = (weights(folder / f"checkpoints/step_{step:08d}") for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    read_at_once = {5, 8, 10, 15, 16}  # evaluated or saved
    if name == "observed":
        read_at_once |= {6, 11, 12}  # the watcher comes before steps 6 and 12
    else:
        read_at_once |= {7}  # the first step after 40% of 16 has other recipes
    assert set(ahead) == set(range(1, 17)) - read_at_once


def test_a_signal_stops_after_the_step_that_had_begun_and_the_run_goes_on(
    tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*RUN, "precision=fp8_delayed", "checkpoint.interval=0"]
    train(compose([*keys, f"run_dir={tmp_path / 'whole'}"]))
    after_step = Guard.after_step

    def signalled(self: Guard, trainer: Trainer, row: dict[str, Any]) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, trainer, row)

    with monkeypatch.context() as patched:
        patched.setattr(Guard, "after_step", signalled)
        with pytest.raises(Stopped):
            train(compose([*keys, f"run_dir={tmp_path / 'run'}"]))
    # step 3 had begun, step 4 was told of the signal, and step 5 was not begun before 4 was read
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved == ["step_00000005"] and 4 in ahead
    train(compose([*keys, f"run_dir={tmp_path / 'run'}", "resume=auto"]))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "ahead_of"),
    [([], {1, 2, 3, 4}), (["guard.max_skipped=1"], set()), (["guard.max_skipped=2"], {1, 3, 4})],
)
def test_the_guard_reads_at_once_where_the_next_number_may_make_it_act(
    overrides: list[str],
    ahead_of: set[int],
    tmp_path: Path,
    ahead: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 1 is told as not finite."""
    after_step = Guard.after_step

    def spoiled(self: Guard, trainer: Trainer, row: dict[str, Any]) -> None:
        after_step(self, trainer, {**row, "loss": float("nan")} if trainer.step == 1 else row)

    monkeypatch.setattr(Guard, "after_step", spoiled)
    keys = [*RUN, *overrides, "train.steps=6", "precision=bf16", "train.eval_interval=0"]
    keys += ["checkpoint.interval=5"]
    stops = pytest.raises(
        UserError, match="guard.max_skipped"
    )  # there is no checkpoint to go back to
    with stops if overrides == ["guard.max_skipped=1"] else nullcontext():
        train(compose([*keys, f"run_dir={tmp_path / 'run'}"]))
    assert set(ahead) == ahead_of


def test_what_touches_state_refuses_a_trainer_that_is_a_step_ahead(
    tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4pretrain.train.hooks.Checkpointing.only_reads", lambda *args: True)
    with pytest.raises(RuntimeError, match="step 9 has begun"):
        train(compose([*RUN, "precision=bf16", f"run_dir={tmp_path / 'run'}"]))


def test_a_run_with_triggers_and_a_hook_that_says_nothing_are_waited_for(tmp_path: Path) -> None:
    nothing: Any = None
    assert not Hook().only_reads(nothing, 1)
    for rule, waits in (("trigger='loss_ratio > 9'", True), ("start=0.5", False)):
        config = compose(
            ["precision=nvfp4", "precision.rules.a.recipe=bf16", f"precision.rules.a.{rule}"]
        )
        trainer: Any = SimpleNamespace(binding=SimpleNamespace(plan=plan_of(config)))
        silent: Any = SimpleNamespace(listen=lambda hear: None)
        assert Triggers(silent).only_reads(trainer, 1) is not waits
