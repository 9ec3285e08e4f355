"""Processes that act as ranks: on gloo in ``tests/dist``, on NCCL in ``tests/gpu``."""

from __future__ import annotations

import itertools
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

_PATIENCE = 600.0  # seconds: for any job, on a machine that is busy with other things


class Ranks:
    """Up to ``limit`` waiting processes; ``run`` has the first ``size`` of them do one job together."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        self._folder = folder
        self._device = device
        self._counter = itertools.count()
        self._processes: list[subprocess.Popen] = []

    def run(self, task: str, overrides: list[str], *, size: int, steps: int = 1) -> dict[str, Any]:
        """The reply of rank 0. Fails the test with the traceback of any rank that raised."""
        while len(self._processes) < size:
            self._processes.append(self._start())
        out = self._folder / f"job{next(self._counter)}"
        out.mkdir()
        for rank in range(size):
            job = {
                "task": task,
                "overrides": overrides,
                "rank": rank,
                "size": size,
                "steps": steps,
                "device": self._device,
                "out": str(out),
                "store": str(out / "store"),
            }
            stdin = self._processes[rank].stdin
            assert stdin is not None
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
        replies = [self._reply(rank) for rank in range(size)]
        for rank, reply in enumerate(replies):
            assert "error" not in reply, f"rank {rank} of {overrides}:\n{reply['error']}"
        return {**replies[0], "out": out}

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=_PATIENCE)

    def _start(self) -> subprocess.Popen:
        root = Path(__file__).parents[2]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}:{root / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
        }
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _reply(self, rank: int) -> dict[str, Any]:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        with selectors.DefaultSelector() as waiting:  # one line a reply: none is buffered
            waiting.register(stdout, selectors.EVENT_READ)
            assert waiting.select(_PATIENCE), f"rank {rank} hangs"
        line = stdout.readline()
        assert line, f"rank {rank} died"
        return json.loads(line)
