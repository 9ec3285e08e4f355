"""A run that stops and goes on is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from records import curve, weights
from wandb_log import not_recorded

SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=8 "
    "train.steps=6 train.eval_interval=2 data.valid_tokens=256 checkpoint.interval=2 "
    "checkpoint.keep_last=9 logging.wandb.mode=disabled logging.console=quiet data.mock=true"
).split()

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ([], 1),
        (["parallel.tensor=2", "parallel.sequence=true"], 2),
        ([], 2),
        (["parallel.pipeline=2"], 2),
    ],
    ids=["single", "TP 2 + SP", "DP 2", "PP 2"],
)
def test_resumed_equals_uninterrupted(ranks, tmp_path: Path, layout: list[str], size: int) -> None:
    """NVFP4 with stochastic rounding, stopped after step 4: same rows, same final weights, all bits."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = [*SMALL, "precision=nvfp4", *layout]
    ranks.run("train", [*run, f"run_dir={whole}"], size=size)
    # what a run that died in step 6 leaves: a later row than its last checkpoint
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_00000006")
    (stopped / "checkpoints" / "latest").write_text("step_00000004\n")
    rows = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(rows[:-2]) + '{"event": "train", "st')

    # the second half is read by a process of its own
    again = [*run, f"run_dir={stopped}", "resume=auto", f"data.workers={int(size == 1)}"]
    ranks.run("train", again, size=size)

    assert curve(stopped) == curve(whole)
    assert len(curve(whole)) == 6 + 3
    last = "checkpoints/step_00000006"
    one, other = weights(whole / last), weights(stopped / last)
    assert one.keys() == other.keys()
    assert any("exp_avg" in key for key in one)
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_saves_and_the_run_goes_on(ranks, tmp_path: Path, number: int) -> None:
    """As Slurm ends a job: status 0, a checkpoint of the step it was in, the same curve afterwards."""
    run = [
        *SMALL,
        "precision=nvfp4",
        "train.steps=16",
        "train.eval_interval=8",
        "checkpoint.interval=0",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ranks.run("train", [*run, f"run_dir={whole}"], size=1)
    command = [sys.executable, "-m", "fp4pretrain", "train", *run, f"run_dir={stopped}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = stopped / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(curve(stopped)) > 2):
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "continue with resume=auto" in said
    assert 2 < len(curve(stopped)) < len(curve(whole))

    ranks.run("train", [*run, f"run_dir={stopped}", "resume=auto"], size=1)
    assert curve(stopped) == curve(whole)


def test_old_checkpoints_go(ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks.run(
        "train", [*SMALL, "precision=bf16", "checkpoint.keep_last=2", f"run_dir={run}"], size=1
    )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000006",
    ]


def test_another_recipe_is_taken_up_when_asked_for(ranks, tmp_path: Path) -> None:
    """``resume=auto`` in another recipe is refused in one line; by name it is said on the console, in
    the metrics, in the history and in wandb, once, also where the run is resumed again."""
    run = tmp_path / "run"
    common = [*SMALL, "logging.wandb.mode=offline", f"run_dir={run}"]
    ranks.run("train", [*common, "precision=nvfp4", "train.steps=4"], size=1)
    fp8 = [*common, "precision=fp8", "resume=auto"]
    refused = ranks.run("train", fp8, size=1)["user_error"]
    assert refused.startswith("resume_with: ")
    assert refused.endswith("resume_with=[precision,train.steps]") or "precision" in refused

    allowed = [*fp8, "resume_with=[precision,train.steps,optim.warmup,optim.decay]"]
    before = (run / "config.yaml").read_text()
    ranks.run("train", allowed, size=1)
    first = curve(run)
    (run / "checkpoints" / "latest").write_text("step_00000004\n")  # once more from there
    ranks.run("train", allowed, size=1)
    assert curve(run) == first
    (row,) = [row for row in first if row["event"] == "changed"]
    assert (row["step"], row["tokens"]) == (5, 4 * 8 * 64)
    assert "precision.fprop.x.format: nvfp4 -> fp8_e4m3" in row["changes"]
    assert not_recorded(run, b"fprop.x.format: nvfp4 -> fp8_e4m3") == []
    assert (run / "config.1.yaml").read_text() == before  # what the first four steps were made with
    starts = json.loads((run / "history.json").read_text())["starts"]
    assert [one["step"] for one in starts] == [0, 4, 4]
    assert [bool(one["changes"]) for one in starts] == [False, True, True]
    stored = json.loads((run / "checkpoints" / "step_00000006" / "run.json").read_text())
    assert stored["fingerprint"]["precision"]["precision.fprop.x.format"] == "fp8_e4m3"
    # from there on fp8 is the run's recipe
    ranks.run("train", [*fp8, "train.steps=7", "resume_with=[train.steps]"], size=1)


def test_dropout_resumes_too(ranks, tmp_path: Path) -> None:
    """Dropout's generators are state: without them the resumed steps would draw other masks."""
    run = [*SMALL, "precision=bf16", "model.attention_dropout=0.2", "model.hidden_dropout=0.2"]
    run = [*run, "parallel.tensor=2", "train.steps=4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ranks.run("train", [*run, f"run_dir={whole}"], size=2)
    from_there = f"resume={whole}/checkpoints/step_00000002"
    ranks.run("train", [*run, f"run_dir={stopped}", from_there], size=2)
    assert curve(stopped) == curve(whole)[-len(curve(stopped)) :]
