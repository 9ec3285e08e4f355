"""What a save leaves: the state of its step, whatever trains on, fails or is killed meanwhile."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.observe import read_rows
from fp4pretrain.train import checkpoint
from fp4pretrain.train.checkpoint import Keep, SaveError, Saving, saving, state
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer, build_trainer


def _state(trainer: Trainer) -> dict[Any, torch.Tensor]:
    return {(box.key, box.offset): box.data for box in state.collect(trainer)[0]}


def _same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _train(trainer: Trainer, steps: int = 1) -> None:
    iterators = trainer.batches(trainer.consumed_samples)
    for _ in range(steps):
        train_step(trainer, iterators)


@pytest.fixture(autouse=True)
def _from_the_start(trainer: Trainer) -> None:
    trainer.step = trainer.consumed_samples = 0


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_the_state_of_its_step_is_saved(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are written only after two further steps: they hold the step of the save."""
    go, write = threading.Event(), saving.write_boxes

    def late(*args: Any) -> Any:
        assert go.wait(30)
        return write(*args)

    monkeypatch.setattr(saving, "write_boxes", late)
    _train(trainer, 2)
    trainer.memory = {"seen": [1]}
    then = _state(trainer)
    under_way = Saving(trainer, tmp_path, Keep(2))
    assert not under_way.finished()
    trainer.memory["seen"].append(2)
    _train(trainer, 2)
    assert _names(tmp_path) == [".step_00000002.partial"]
    assert not _same(_state(trainer), then)
    go.set()
    path = under_way.finish()
    assert _names(tmp_path) == ["latest", "step_00000002"]
    checkpoint.load(trainer, path)
    assert trainer.step == 2
    assert trainer.memory == {"seen": [1]}
    assert _same(_state(trainer), then)


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(2, 0, [5, 6]), (1, 0, [6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6]), (9, 0, [1, 2, 3, 4, 5, 6])],
)
def test_the_newest_stay_and_every_nth(
    trainer: Trainer, tmp_path: Path, last: int, every: int, kept: list[int]
) -> None:
    for step in range(1, 7):
        trainer.step = step
        checkpoint.save(trainer, tmp_path, keep_last=last, keep_every=every)
    assert _names(tmp_path) == ["latest"] + [f"step_{step:08d}" for step in kept]
    assert (tmp_path / "latest").read_text() == "step_00000006\n"


@pytest.mark.parametrize("distributed", [False, True])
def test_a_run_that_made_no_update_yet_is_saved_whole(
    trainer: Trainer, tmp_path: Path, distributed: bool
) -> None:
    """A guard may leave out the first updates: weights, masters and zero moments come back."""
    config = deepcopy(trainer.config)
    config.parallel.distributed_optimizer = distributed
    config.optim.params_dtype = "bf16"
    fresh, later = (build_trainer(config, trainer.world, trainer.layout) for _ in range(2))
    path = checkpoint.save(fresh, tmp_path, keep_last=1)
    _train(later, 2)
    checkpoint.load(later, path)
    assert _same(_state(fresh), _state(later))
    for each in (fresh, later):
        _train(each, 2)
    assert _same(_state(fresh), _state(later))


def test_steps_that_were_taken_back_go_and_their_step_is_saved_anew(
    trainer: Trainer, tmp_path: Path
) -> None:
    for step in (2, 4, 6, 3, 4):
        trainer.step, trainer.skipped_samples = step, step
        checkpoint.save(trainer, tmp_path, keep_last=2)
        trainer.skipped_samples = 0
    assert _names(tmp_path) == ["latest", "step_00000003", "step_00000004"]
    assert checkpoint.find(tmp_path, "auto") == tmp_path / "step_00000004"


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to write more into any file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 10, 3000, 100_000], ids=["all", "latest", "json", "tensors"])
def test_a_save_that_does_not_fit_changes_nothing(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Refused at any place: in the tensors' file, run.json, the manifest or the pointer."""
    trainer.step = 1
    checkpoint.save(trainer, tmp_path, keep_last=1)
    trainer.step = 2
    with _files_up_to(size), pytest.raises(SaveError, match=r"step 2 was not written: File too l"):
        checkpoint.save(trainer, tmp_path, keep_last=1)
    assert _names(tmp_path) == ["latest", "step_00000001"]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    checkpoint.load(trainer, tmp_path / "step_00000001")
    trainer.step = 2
    assert checkpoint.save(trainer, tmp_path, keep_last=1).name == "step_00000002"


RUN = (
    "model.num_layers=1 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=32 train.micro_batch=1 train.global_batch=1 "
    "train.steps=6 train.eval_interval=0 data.valid_tokens=256 checkpoint.interval=2 "
    "checkpoint.keep_last=9 logging.wandb.mode=disabled data.mock=true precision=bf16"
).split()


def _command(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "fp4pretrain", "train", *RUN, f"run_dir={run}", *more]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare makes the small disk")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_leaves_the_run_alive(tmp_path: Path, asynchronous: str) -> None:
    """A real one, a tmpfs of 2 MiB of this process's own: it holds one checkpoint, not two."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    train = _command(disk / "run", f"checkpoint.asynchronous={asynchronous}")
    script = (
        f'mount -t tmpfs -o size=2m tmpfs {disk} && "$@"; code=$?; cp -r {disk} {out}; exit $code'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *train], capture_output=True, text=True
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stderr
    run = out / "run"
    for step in (4, 6):
        said = f"warning: the checkpoint of step {step} was not written: No space left on device"
        assert said in done.stdout
    assert "warning: the checkpoint of step 6 is missing; the last one" in done.stdout
    assert _names(run / "checkpoints") == ["latest", "step_00000002"]
    assert checkpoint.find(run / "checkpoints", "auto") == run / "checkpoints" / "step_00000002"
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    failed = [row for row in rows if row["event"] == "save_failed"]
    assert len(failed) == 2
    assert all("No space left" in row["problem"] for row in failed)


class Moments:
    """Copies of a folder as it was before each thing that was done to a file in it: what a process
    that is killed there leaves."""

    WHAT = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.on = False
        self.seen: list[tuple[str, Path]] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on or event not in self.WHAT or not str(args[0]).startswith(str(self.folder)):
            return
        self.on = False
        copy = self.copies / str(len(self.seen))
        shutil.copytree(self.folder, copy)
        self.seen.append((f"{event} {args}", copy))
        self.on = True


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_killed_at_any_moment_of_a_save_nothing_is_lost(
    trainer: Trainer, tmp_path: Path, again: bool
) -> None:
    """Before each operation of a save that also removes the oldest: the latest is one of the two
    newest checkpoints, whole, and once a run has started again nothing but checkpoints is left."""
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        trainer.step = step
        checkpoint.save(trainer, folder, keep_last=2)
    if again:
        (folder / "latest").write_text("step_00000002\n")  # as a rollback does
    moments = Moments(folder, tmp_path / "copies")
    trainer.step, trainer.skipped_samples = (4 if again else 6), 1
    moments.on = True
    checkpoint.save(trainer, folder, keep_last=1)
    moments.on = False
    trainer.skipped_samples = 0
    assert len(moments.seen) > 12
    good = {"step_00000002", "step_00000004"} if again else {"step_00000004", "step_00000006"}
    for what, copy in moments.seen:
        checkpoint.remove_leftovers(copy)
        assert all(name == "latest" or name.startswith("step_") for name in _names(copy)), what
        found = checkpoint.find(copy, "auto")
        assert found is not None and found.name in good, what
        checkpoint.load(trainer, found)
    assert _names(folder) == ["latest", f"step_{4 if again else 6:08d}"]


def test_a_failure_of_the_writer_is_one_line(trainer: Trainer, tmp_path: Path) -> None:
    """Not of the disk: whatever a thread raises is said where the save ends, on every rank."""
    trainer.step = 1
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    with pytest.raises(SaveError, match=r"step 1 was not written: \w"):
        checkpoint.save(trainer, tmp_path / "checkpoints", keep_last=1)
