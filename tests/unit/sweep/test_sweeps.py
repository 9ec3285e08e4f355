"""A sweep: a run that fails costs itself, and the same command again does what is left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fp4pretrain.config import RunConfig, compose
from fp4pretrain.errors import UserError
from fp4pretrain.observe import read_rows
from fp4pretrain.overrides import expand_sweep
from fp4pretrain.sweep import Outcome, engine, train_all
from fp4pretrain.sweep.planning import Planned
from fp4pretrain.sweep.progress import Progress
from fp4pretrain.train.main import Stopped, train

RUN = (
    "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2 model.ffn_hidden_size=64 "
    "model.seq_length=32 data.mock=true parallel.device=cpu precision=bf16 train.steps=4 "
    "train.micro_batch=1 train.global_batch=2 train.eval_interval=2 data.valid_tokens=64 logging=quiet "
    "optim.warmup=0 optim.decay=0 logging.wandb.mode=disabled precision.keep.last_blocks=0"
).split()


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def swept(*overrides: str) -> list[Outcome]:
    return train_all(expand_sweep([*RUN, *overrides]))


def states(outcomes: list[Outcome]) -> list[str]:
    return [one.state for one in outcomes]


def steps(path: str) -> list[int]:
    return [r["step"] for r in read_rows(Path(path) / "metrics.jsonl") if r["event"] == "train"]


def test_a_diverged_run_costs_itself_and_the_same_command_passes_over_the_finished_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("optim.lr=1e9,1e-3", "train.steps=8", "name=a")
    found = swept(*command)
    assert states(found) == ["failed", "finished"]
    said = capsys.readouterr()
    assert "run 1 of 2: runs/a-lr_1e9  eta ?" in said.out
    assert "run 2 of 2: runs/a-lr_0.001  eta 0:" in said.out
    assert "FAILED" in said.out
    assert said.err.startswith("fp4pretrain: failed: optim.lr=1e9: guard.max_skipped: 5 steps")
    assert said.err.count("\n") == 1

    tried: list[Path] = []

    def fails(config: RunConfig, *, until: float | None) -> None:
        tried.append(Path(str(config.run_dir)))
        assert config.resume == "auto"
        raise UserError("again")

    monkeypatch.setattr(engine, "train", fails)
    assert states(swept(*command)) == ["failed", "finished"]
    assert tried == [Path("runs/a-lr_1e9")]
    assert "1 of 2 runs are finished already\nrun 2 of 2: runs/a-lr_1e9" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_its_comparison_has_a_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A budget stops a run as SIGTERM does; the same command goes on from there."""
    command = ("precision=bf16,mxfp4_h16", "seed=1", "logging.console=lines")
    with pytest.raises(Stopped) as stopped:
        train(compose([*RUN, "seed=1"]), until=time.time() - 1)
    assert not stopped.value.by_signal
    assert "the time is over: saved runs/bf16-seed1/checkpoints/step_00000001" in (
        capsys.readouterr().out
    )
    assert states(swept(*command)) == ["finished", "finished"]
    assert steps("runs/bf16-seed1") == steps("runs/mxfp4_h16-seed1") == [1, 2, 3, 4]
    page = Path("runs/sweep-precision_bf16_mxfp4_h16.html")
    assert "mxfp4_h16" in page.read_text() and page.with_suffix(".png").is_file()
    assert "baseline bf16-seed1" in capsys.readouterr().out


def test_after_the_budget_no_run_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert states(swept("seed=1,2", "sweep.budget=0.000001s")) == ["left", "left"]
    assert not Path("runs").exists()
    assert "2 of 2 runs are left; the same command goes on" in capsys.readouterr().out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that would be trained; a seed of 13 crashes."""
    folders: list[str] = []

    def fake(config: RunConfig, *, until: float | None) -> None:
        folders.append(str(config.run_dir))
        if config.seed == 13:
            raise RuntimeError("out of\nluck")

    monkeypatch.setattr(engine, "train", fake)
    return folders


def test_an_impossible_combination_is_one_line_and_the_others_run(
    trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be composed, or it cannot run here."""
    found = swept(
        "model.num_attention_heads=2,3", "model.num_query_groups=1", "parallel.tensor=1,2", "name=a"
    )
    assert states(found) == ["failed", "failed", "finished", "failed"]
    assert len(trained) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, told in zip(
        lines,
        (
            r"model.num_attention_heads=3 parallel.tensor=1: model.",
            r"model.num_attention_heads=3 parallel.tensor=2: model.",
            r"model.num_attention_heads=2 parallel.tensor=2: parallel.tensor x parallel.pipeline: ",
        ),
        strict=True,
    ):
        assert line.startswith(f"fp4pretrain: failed: {told}")


def test_a_crash_costs_its_own_run(trained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = swept("seed=13,14")
    assert states(found) == ["failed", "finished"]
    assert trained == ["runs/bf16-seed13", "runs/bf16-seed14"]
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "failed: seed=13: RuntimeError: out of luck\n" in said.out


def test_where_nothing_is_left_the_first_line_says_why(trained: list[str]) -> None:
    with pytest.raises(UserError, match=r"^train\.steps: 0 is out of range"):
        swept("seed=1,2", "train.steps=0")
    with pytest.raises(UserError, match=r"^parallel\.tensor x "):
        swept("seed=1,2", "parallel.tensor=2")


def test_a_folder_of_another_run_is_refused_before_anything_is_trained(trained: list[str]) -> None:
    train(compose([*RUN, "seed=2", "train.steps=1"]))
    with pytest.raises(
        UserError, match=r"^run_dir: runs/bf16-seed2 .* another run \(train.steps is 1 there and 4"
    ):
        swept("seed=1,2")
    assert trained == []
    # what shapes nothing may differ
    assert states(swept("seed=1,2", "train.steps=1", "checkpoint.interval=3")) == ["finished"] * 2
    assert trained == ["runs/bf16-seed1"]


def test_keys_of_the_command_have_one_value_and_are_in_no_run(trained: list[str]) -> None:
    with pytest.raises(UserError, match="^sweep: its keys are the whole command's"):
        swept("sweep.budget=1h,2h")
    with pytest.raises(UserError, match=r"^sweep\.budget: 3 is no time; write 90s"):
        swept("sweep.budget=3")


def test_the_time_left_is_that_of_the_work_left() -> None:
    """A run of four times the steps counts for four."""
    runs = [
        Planned(compose([*RUN, f"train.steps={steps}", f"run_dir=runs/{steps}"]))
        for steps in (2, 4, 16)
    ]
    now = [0.0]
    said: list[str] = []
    progress = Progress(runs, total=5, say=said.append, clock=lambda: now[0])
    for run in runs:
        progress.start(run)
        now[0] += 10 * run.config.train.steps
        progress.end(run)
    assert said == [
        "run 3 of 5: runs/2  eta ?",
        "run 4 of 5: runs/4  eta 0:03:20",
        "run 5 of 5: runs/16  eta 0:02:40",
    ]
