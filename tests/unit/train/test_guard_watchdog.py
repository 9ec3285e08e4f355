"""The watchdog's thread: when it speaks, what it writes, and that it hears the other ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from fp4pretrain.config import GuardConfig
from fp4pretrain.train.hooks.watchdog import STATUS, Watchdog


class _Logging:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A started watchdog in a world of one that notes its exit, and what it would talk to."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, src: None)
    made: list[Watchdog] = []

    def start(*, timeout: float, action: str, main: bool = True) -> SimpleNamespace:
        trainer = SimpleNamespace(
            world=SimpleNamespace(rank=0 if main else 1, is_main=main), step=3, tokens=99
        )
        logging = _Logging()
        settings = GuardConfig(hang_timeout=timeout, hang_action=action)
        dog = Watchdog(tmp_path / "stacks", logging, settings)  # type: ignore[arg-type]  # a stand-in
        made.append(dog)
        dog.start(trainer)  # type: ignore[arg-type]  # a stand-in
        return SimpleNamespace(
            dog=dog, trainer=trainer, rows=logging.rows, exits=exits, stacks=tmp_path / "stacks"
        )

    yield start
    for dog in made:
        dog.close()


def _until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def _step(running: SimpleNamespace) -> None:
    running.trainer.step += 1
    running.dog.after_step(running.trainer, {})
    running.dog.before_step(running.trainer)


def _told(running: SimpleNamespace) -> int:
    path = running.stacks / f"rank_{running.trainer.world.rank}.txt"
    return path.read_text().count(" s after step ") if path.exists() else 0


def test_a_hang_is_told_once_with_the_stack_of_every_thread(
    watch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    running = watch(timeout=0.3, action="report")
    _step(running)
    assert _until(lambda: bool(running.rows))
    text = (running.stacks / "rank_0.txt").read_text()
    assert f"rank 0, process {os.getpid()}" in text
    assert "in _until" in text  # where the main thread stands
    assert running.rows[0] | {"seconds": 0} == {
        "event": "hang",
        "step": 4,
        "tokens": 99,
        "seconds": 0,
    }
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert str(running.stacks) in said
    time.sleep(1)
    assert _told(running) == 1
    _step(running)
    assert _until(lambda: _told(running) == 2)  # a second hang is told after the first
    assert not running.exits
    running.dog.close()
    assert [p.name for p in running.stacks.iterdir()] == ["rank_0.txt"]


def test_steps_keep_it_quiet(watch: Any) -> None:
    running = watch(timeout=2.0, action="report")
    for _ in range(8):
        _step(running)
        time.sleep(0.3)
    assert not running.rows


@pytest.mark.parametrize("phase", ["first step", "hooks"])
def test_the_first_step_and_the_hooks_have_ten_times_as_long(watch: Any, phase: str) -> None:
    running = watch(timeout=0.2, action="report")
    if phase == "first step":
        running.dog.before_step(running.trainer)
    else:
        running.dog.after_step(running.trainer, {})
    began = time.monotonic()
    assert _until(lambda: bool(running.rows))
    assert time.monotonic() - began > 1.9


def test_restart_ends_the_process_after_a_moment_for_the_others(watch: Any) -> None:
    running = watch(timeout=0.3, action="restart")
    _step(running)
    assert _until(lambda: running.exits == [STATUS])
    assert _told(running) == 1


def test_a_rank_whose_time_is_not_over_hears_the_others(watch: Any) -> None:
    running = watch(timeout=10.0, action="report", main=False)
    running.dog._tick = 0.02
    running.dog._thread.join(1.1)  # its first tick was made with the old length
    running.stacks.mkdir(exist_ok=True)
    name = running.dog._thread._args[1]
    (running.stacks / f"{name}-{running.trainer.step}").touch()
    assert _until(lambda: _told(running) == 1)
    assert not running.rows  # the main rank logs it


def test_off_means_no_thread(watch: Any) -> None:
    running = watch(timeout=0.0, action="restart")
    _step(running)
    assert running.dog._thread is None
    assert not running.stacks.exists()
