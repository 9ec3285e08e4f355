"""Two processes cannot train one folder; a dead one is in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fp4pretrain.errors import UserError
from fp4pretrain.train import lock
from fp4pretrain.train.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from fp4pretrain.train.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("taken", flush=True)
time.sleep(600)
"""


def held(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_folder_is_one_process_s_until_it_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = held(run)
    try:
        line = rf"^run_dir: .*run is being trained by process {process.pid} on .*another run_dir$"
        with pytest.raises(UserError, match=line):
            RunLock(run).acquire()
        process.send_signal(signal.SIGSTOP)  # Ctrl-Z: it is still there
        with pytest.raises(UserError, match="is being trained by"):
            RunLock(run).acquire()
    finally:
        process.kill()
        process.wait()
    mine = RunLock(run)
    mine.acquire()  # killed, without a chance to let go
    mine.release()


def test_letting_go_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for kept in (False, True):
        mine = RunLock(run)
        mine.acquire()
        with pytest.raises(UserError, match="is being trained by"):
            RunLock(run).acquire()
        if kept:
            (run / "file").touch()
        mine.release()
        mine.release()
        assert run.exists() == kept
    assert [p.name for p in run.iterdir()] == ["file"]


def test_many_at_once_have_one_holder(tmp_path: Path) -> None:
    """Each time one lets go, and the file with it, exactly one other may come in."""
    inside, most, turns = 0, 0, 0
    refused: list[str] = []
    guard, end = threading.Lock(), time.monotonic() + 60

    def train() -> None:
        nonlocal inside, most, turns
        while turns < 8 and time.monotonic() < end:
            mine = RunLock(tmp_path / "run")
            try:
                mine.acquire()
            except UserError as error:
                refused.append(str(error))
                time.sleep(0.0005)
                continue
            with guard:
                inside, turns = inside + 1, turns + 1
                most = max(most, inside)
            time.sleep(0.001)
            with guard:
                inside -= 1
            mine.release()

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert turns >= 8
    assert {why for why in refused if "is being trained by" not in why} == set()


@pytest.mark.parametrize("alive", [True, False])
def test_another_machine_is_watched_for_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    """Where flock does not reach: a holder that renews its time stays, a silent one goes."""
    file = tmp_path / ".lock"
    other = {"pid": 1, "host": "node7", "machine": "another", "since": 0, "token": "x"}
    file.write_text(json.dumps(other))
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=beat)
    mine = RunLock(tmp_path, silence=1.0)
    if alive:
        thread.start()
        try:
            with pytest.raises(UserError, match="process 1 on node7"):
                mine.acquire()
        finally:
            done.set()
            thread.join()
    else:
        mine.acquire()
        assert json.loads(file.read_text())["pid"] == os.getpid()
        mine.release()


def test_the_holder_gives_signs_of_life_and_notices_that_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(lock.os, "_exit", lambda status: ended.set())
    mine = RunLock(tmp_path / "run", beat=0.02)
    mine.acquire()
    file = tmp_path / "run" / ".lock"
    first = file.stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while file.stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not ended.is_set()
    file.write_text(json.dumps({"token": "another's", "pid": 1, "host": "node7"}))
    assert ended.wait(10)
    mine.release()
