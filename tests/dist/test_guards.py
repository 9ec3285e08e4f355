"""NaN, Inf, spikes and hangs: nothing is written, every rank agrees, and the run goes around them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from records import TIMING, curve, weights

SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=8 "
    "train.eval_interval=0 data.valid_tokens=256 checkpoint.interval=2 checkpoint.keep_last=9 "
    "logging.wandb.mode=disabled logging.console=quiet data.mock=true precision=bf16"
).split()

pytestmark = pytest.mark.xdist_group("ranks")


def _events(run: Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["event"], row["step"]) for row in rows if row["event"] not in ("train", "eval")]


def _different(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoints that differ in any bit: weights, masters and Adam's moments."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert any("exp_avg" in key for key in a)
    return [key for key in a if not torch.equal(a[key], b[key])]


def _described(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "run.json").read_text())


@pytest.mark.parametrize(
    ("layout", "size", "poison"),
    [
        (["precision=nvfp4"], 1, "loss:0:8"),
        ([], 1, "gradient:0:8"),
        # only its own rank sees it: the norm of the gradients counts rank 0's copy
        (["parallel.tensor=2"], 2, "gradient:1:8"),
        (["parallel.pipeline=2"], 2, "gradient:0:8"),
        (["parallel.pipeline=2"], 2, "loss:1:8"),
        ([], 2, "loss:1:8"),
        (["parallel.distributed_optimizer=false"], 2, "gradient:1:8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_bad_step_writes_nothing(
    ranks, tmp_path: Path, layout: list[str], size: int, poison: str
) -> None:
    """One microbatch of one rank spoils step 2 of 3: weights, masters and moments stay, bit for bit."""
    run = tmp_path / "run"
    short = [*SMALL, "train.steps=3", "checkpoint.interval=1", f"run_dir={run}", *layout]
    reply = ranks.run("guard_tasks.poisoned_run", [*short, f"poison={poison}"], size=size)
    assert "user_error" not in reply, reply
    one, two, three = (run / "checkpoints" / f"step_0000000{step}" for step in (1, 2, 3))
    assert not _different(one, two)
    state = {key for key in weights(two) if key.startswith("optimizer.")}
    assert state <= set(_different(two, three))
    assert _events(run) == [("skipped", 2)]
    rows = curve(run)
    assert [row["skipped_steps"] for row in rows if row["event"] == "train"] == [0, 1, 1]
    bad = next(row for row in rows if row["step"] == 2 and row["event"] == "train")
    assert bad["grad_norm"] in ("NaN", "Infinity")
    assert (bad["loss"] == "NaN") == poison.startswith("loss")
    assert _described(two)["consumed_samples"] == 16
    if "parallel.pipeline=2" not in layout:
        norms = [(reply["out"] / f"rank_{rank}.json").read_text() for rank in range(size)]
        assert len(set(norms)) == 1


BAD = "poison=loss:0:24,32,40"  # steps 4, 5 and 6 of the first time
ROLLING = [*SMALL, "train.steps=8", "guard.max_skipped=3", "guard.skip_batches=2"]


def _killed(run: Path, copy: Path, *, step: int, rows: int) -> Path:
    """What a run leaves that dies after ``rows`` rows, with the checkpoint of ``step`` its latest."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    (copy / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:rows]))
    return copy


@pytest.fixture(scope="module")
def rolled_back(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 4 to 6 are bad: back to step 2, past what was read and two batches more."""
    run = tmp_path_factory.mktemp("guard") / "whole"
    reply = ranks.run("guard_tasks.poisoned_run", [*ROLLING, f"run_dir={run}", BAD], size=1)
    assert "user_error" not in reply, reply
    return run


def test_after_too_many_bad_steps_the_run_goes_back_and_around_the_data(rolled_back: Path) -> None:
    rows = curve(rolled_back)
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert _events(rolled_back) == [
        *(("skipped", step) for step in (4, 5, 6)),
        ("rollback", 6),
    ]
    back = next(row for row in rows if row["event"] == "rollback")
    # 48 samples were read and 16 more are passed over; step 2 stood at 16
    assert (back["to_step"], back["passed_over_samples"]) == (2, 48)
    end = _described(rolled_back / "checkpoints" / "step_00000008")
    assert end["consumed_samples"] == 64 + 6 * 8
    assert end["skipped_samples"] == 48
    assert end["memory"]["guard"]["rollbacks"] == 1
    assert [row["tokens"] for row in rows if row["event"] == "train"][-1] == 8 * 8 * 64
    # the mock dataset ends at 64 samples: from there on it begins again
    assert all(isinstance(row["loss"], float) for row in rows if row["event"] == "train")


def _ends_alike(ranks, killed: Path, whole: Path) -> None:
    """Resumed, with the poison where it was: the same rows, record and last checkpoint, bit for bit."""
    resumed = [*ROLLING, f"run_dir={killed}", "resume=auto", BAD]
    reply = ranks.run("guard_tasks.poisoned_run", resumed, size=1)
    assert "user_error" not in reply, reply
    assert curve(killed) == curve(whole)
    assert (killed / "rollbacks.json").read_text() == (whole / "rollbacks.json").read_text()
    last = "checkpoints/step_00000008"
    assert not _different(whole / last, killed / last)
    assert _described(killed / last) == _described(whole / last)


@pytest.mark.parametrize("rows", [6, 7], ids=["rollback", "first step after it"])
def test_a_run_killed_after_its_rollback_resumes_to_the_same_end(
    ranks, tmp_path: Path, rolled_back: Path, rows: int
) -> None:
    """Its checkpoint is older than the trouble and knows nothing of it."""
    killed = _killed(rolled_back, tmp_path / "killed", step=2, rows=rows)
    _ends_alike(ranks, killed, rolled_back)


def test_a_run_killed_after_a_skip_resumes_to_the_same_end(
    ranks, tmp_path: Path, rolled_back: Path
) -> None:
    """Step 4 is the first bad one; its checkpoint holds one skipped step of the three in a row."""
    patient = tmp_path / "patient"  # never goes back, so it still has that checkpoint
    never = [*ROLLING, f"run_dir={patient}", "guard.max_skipped=0", BAD]
    ranks.run("guard_tasks.poisoned_run", never, size=1)
    killed = _killed(patient, tmp_path / "killed", step=4, rows=7)
    assert _events(killed) == [("skipped", 4), ("skipped", 5)]
    _ends_alike(ranks, killed, rolled_back)


def test_a_run_that_goes_back_too_often_stops_in_a_line_with_its_checkpoints(
    ranks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    bad = [*ROLLING, "guard.max_rollbacks=1", f"run_dir={run}"]
    reply = ranks.run("guard_tasks.poisoned_run", [*bad, "poison=loss:1:24-"], size=2)
    line = reply["user_error"]
    assert line.startswith("guard.max_rollbacks: 3 steps in a row were not finite up to step 5, ")
    assert "\n" not in line
    assert [name for name, _ in _events(run)].count("rollback") == 1
    assert _events(run)[-1][0] == "stopped"
    # the count has outlived the process: once more, and it stops at once
    again = ranks.run(
        "guard_tasks.poisoned_run", [*bad, "resume=auto", "poison=loss:1:24-"], size=2
    )
    assert again["user_error"] == line
    assert [name for name, _ in _events(run)].count("rollback") == 1
    # and where the trouble is gone the run goes on
    assert "user_error" not in ranks.run("train", [*bad, "resume=auto"], size=2)
    assert (run / "checkpoints" / "latest").read_text() == "step_00000008\n"


def test_without_a_checkpoint_the_state_before_the_trouble_is_saved(ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bad = [*ROLLING, "checkpoint.interval=0", f"run_dir={run}"]
    line = ranks.run("guard_tasks.poisoned_run", [*bad, BAD], size=1)["user_error"]
    assert line.startswith("guard.max_skipped: 3 steps in a row were not finite up to step 6, ")
    assert str(run / "checkpoints" / "step_00000006") in line
    reply = ranks.run("guard_tasks.poisoned_run", [*bad, "resume=auto", BAD], size=1)
    assert "user_error" not in reply
    steps = [row["step"] for row in curve(run) if row["event"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("action", "back"), [("rollback", True), ("report", False)])
def test_a_spike_has_the_same_response(ranks, tmp_path: Path, action: str, back: bool) -> None:
    """Losses three times as high from step 6 on, for three steps: known as a spike after two."""
    run = tmp_path / "run"
    rule = f"guard.spike.action={action} guard.spike.warmup=4 guard.spike.patience=2".split()
    steps = [*SMALL, "train.steps=9", *rule, f"run_dir={run}"]
    reply = ranks.run("guard_tasks.poisoned_run", [*steps, "poison=spike:0:40,48,56"], size=2)
    assert "user_error" not in reply, reply
    events = [("spike", 7), *([("rollback", 7)] if back else [])]
    assert _events(run) == events
    rows = curve(run)
    spike = next(row for row in rows if row["event"] == "spike")
    assert spike["since"] == 6
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert len(losses) == 9
    assert set(TIMING).isdisjoint(rows[0])
    if back:
        assert next(row for row in rows if row["event"] == "rollback")["to_step"] == 4


HANGING = """
import sys, time
from fp4pretrain.train import loop

train_step = loop.train_step

def standing_still():
    time.sleep(600)

def hanging(trainer, iterators, **how):
    if trainer.world.rank == 1 and trainer.step == 2:
        standing_still()
    return train_step(trainer, iterators, **how)

loop.train_step = hanging
from fp4pretrain.cli import main
main(sys.argv[1:])
"""


def test_a_rank_that_hangs_ends_the_run_with_every_ranks_stacks(tmp_path: Path) -> None:
    """Rank 1 stands still, rank 0 waits for it in a collective: both say where, and both end."""
    run = tmp_path / "run"
    overrides = [*SMALL, "train.steps=4", "guard.hang_timeout=5", f"run_dir={run}"]
    port = free_port()
    ranks = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        environment = {key: str(value) for key, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", HANGING, "train", *overrides, "parallel.device=cpu"]
        ranks.append(
            subprocess.Popen(
                command, env=os.environ | environment, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        said = [process.communicate(timeout=600)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [75, 75], said
    stacks = [(run / "stacks" / f"rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert "in standing_still" in stacks[1]
    assert "in train_step" in stacks[0]
    assert all("after step 2\n" in text for text in stacks)
    line = next(line for line in said[0].splitlines() if "guard.hang_timeout" in line)
    assert str(run / "stacks") in line
    assert _events(run) == [("hang", 2)]
