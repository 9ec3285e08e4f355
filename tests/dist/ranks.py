"""Processes that act as ranks: on gloo in ``tests/dist``, on NCCL in ``tests/gpu`` and ``scripts/layouts``.

A process stays for job after job. On GPUs process i uses GPU i, so jobs of few ranks can run side by side.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATIENCE = 600.0  # seconds: for any job, on a machine that is busy with other things


@dataclass(frozen=True)
class Job:
    """What ``start`` began, for ``finish``: the processes that do it, and their folder."""

    processes: range
    overrides: Sequence[str]
    out: Path


class Ranks:
    """Waiting processes, started as they are needed; each job takes some of them and their groups."""

    def __init__(self, folder: Path, *, device: str = "cpu", patience: float = _PATIENCE) -> None:
        self._folder = folder
        self._device = device
        self.patience = patience
        self._counter = itertools.count()
        self._processes: dict[int, subprocess.Popen] = {}

    def run(self, task: str, overrides: list[str], *, size: int, steps: int = 1) -> dict[str, Any]:
        """The reply of rank 0. Fails the test with the traceback of any rank that raised."""
        return self.finish(self.start(task, overrides, size=size, steps=steps))

    def start(
        self, task: str, overrides: list[str], *, size: int, steps: int = 1, first: int = 0
    ) -> Job:
        """Have processes ``first`` to ``first + size - 1`` begin a job as its ranks 0 to ``size - 1``."""
        out = self._folder / f"job{next(self._counter)}"
        out.mkdir()
        job = Job(range(first, first + size), overrides, out)
        for rank, number in enumerate(job.processes):
            if number not in self._processes:
                self._processes[number] = self._start()
            told = {
                "task": task,
                "overrides": overrides,
                "rank": rank,
                "local_rank": number,
                "size": size,
                "steps": steps,
                "device": self._device,
                "out": str(out),
                "store": str(out / "store"),
            }
            stdin = self._processes[number].stdin
            assert stdin is not None
            stdin.write(json.dumps(told) + "\n")
            stdin.flush()
        return job

    def finish(self, job: Job) -> dict[str, Any]:
        """The reply of rank 0. A job in which a rank fails costs its processes: later ones get others.

        Raises AssertionError, with what the first rank to fail said.
        """
        replies: dict[int, dict[str, Any]] = {}
        failed = ""
        deadline = time.monotonic() + self.patience
        with selectors.DefaultSelector() as waiting:  # one line a reply: none is buffered
            for rank, number in enumerate(job.processes):
                stdout = self._processes[number].stdout
                assert stdout is not None
                waiting.register(stdout, selectors.EVENT_READ, (rank, stdout))
            while len(replies) < len(job.processes) and not failed:
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    rank, stdout = key.data
                    line = stdout.readline()
                    replies[rank] = json.loads(line) if line else {"error": "it died"}
                    waiting.unregister(stdout)
                    if "error" in replies[rank] and not failed:
                        failed = f"rank {rank}: {replies[rank]['error']}"
                if not ready:
                    silent = sorted(set(range(len(job.processes))) - replies.keys())
                    failed = f"ranks {silent} have not answered in {self.patience:.0f} s"
        if failed:
            for number in job.processes:
                process = self._processes.pop(number)
                process.kill()
                process.wait()
        assert not failed, f"{' '.join(job.overrides)}\n{failed}"
        return {**replies[0], "out": job.out}

    def close(self) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes.values():
            process.wait(timeout=self.patience)

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
