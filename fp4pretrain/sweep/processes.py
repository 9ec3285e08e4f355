"""Several runs at once on one machine, each in processes of its own.

``jobs`` runs share each GPU; a run with several ``ranks`` has as many GPUs (torchrun gives each rank
one). Without GPUs there are ``jobs`` runs at once, which share the cores. Threads wait for processes, so a
pool of threads is all it takes. A signal to this process goes to all of them: they save and leave.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch

from fp4pretrain.config import SweepConfig
from fp4pretrain.errors import UserError
from fp4pretrain.sweep.planning import Outcome, Planned
from fp4pretrain.sweep.progress import Progress
from fp4pretrain.sweep.starting import arguments, last_words, open_log, outcome
from fp4pretrain.train.asked import SIGNALS
from fp4pretrain.train.main import Stopped


class Processes:
    """Trains runs ``at_once`` beside each other. Raises UserError where the machine has too few GPUs."""

    def __init__(self, settings: SweepConfig, *, cpu: bool) -> None:
        self._ranks = settings.ranks
        gpus = [] if cpu else visible_gpus()
        if gpus and len(gpus) < self._ranks:
            raise UserError(
                f"sweep.ranks: a run of {self._ranks} does not fit the {len(gpus)} GPUs here; lower it, or "
                "set parallel.device=cpu"
            )
        groups = [",".join(gpus[n : n + self._ranks]) for n in range(0, len(gpus), self._ranks)]
        whole = [one for one in groups if one.count(",") == self._ranks - 1] or [""]
        places = whole * settings.jobs  # GPUs in turn
        self.at_once = len(places)
        self._places: queue.SimpleQueue[str] = queue.SimpleQueue()
        for place in places:
            self._places.put(place)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._threads = max(1, (cores or 1) // (self.at_once * self._ranks))
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._signalled = False

    def train(
        self,
        runs: list[Planned],
        *,
        until: float | None,
        progress: Progress,
        told: Callable[[Outcome], None],
    ) -> list[Outcome]:
        """Train all runs; ``told`` is called with each as it ends. Raises Stopped after a signal."""

        def one(run: Planned) -> Outcome:
            place = self._places.get()
            try:
                if self._signalled or (until is not None and time.time() >= until):
                    return Outcome(run, run.told, "left")
                progress.start(run)
                try:
                    found = self._one(run, place, until=until)
                except UserError as error:
                    found = Outcome(run, run.told, "failed", str(error))
                progress.end(run)
                told(found)
                return found
            finally:
                self._places.put(place)

        with self._passing_signals(), ThreadPoolExecutor(self.at_once) as pool:
            found = list(pool.map(one, runs))
        if self._signalled:
            raise Stopped(by_signal=True)
        return found

    def _one(self, run: Planned, gpus: str, *, until: float | None) -> Outcome:
        command = [sys.executable]
        if self._ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            command += ["--nproc-per-node", str(self._ranks)]
        command += ["-m", "fp4pretrain", "train", *arguments(run, until=until)]
        environment = {
            "OMP_NUM_THREADS": str(self._threads),
            # overlap of communication with GEMMs counts on one hardware queue (launch/torchrun.sh)
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # after SIGTERM torchrun gives ranks this many seconds to save
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
            **os.environ,
            **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}),
        }
        with open_log(run.path) as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self._alive.add(process)
        if self._signalled:  # while the process was being started
            process.send_signal(signal.SIGTERM)
        status = process.wait()
        self._alive.discard(process)
        return outcome(run, problem=None if status == 0 else last_words(run.path))

    @contextmanager
    def _passing_signals(self) -> Iterator[None]:
        """Runs save and leave where this process is told to; a second Ctrl-C ends them at once, ranks under
        torchrun too."""

        def passed(number: int, frame: Any) -> None:
            again, self._signalled = self._signalled and number == signal.SIGINT, True
            for process in list(self._alive):
                if again:
                    _kill_all(process.pid)
                else:
                    process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, passed) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _kill_all(pid: int) -> None:
    """A process and its children: torchrun's ranks are in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(n) for n in range(count)] if given is None else given.split(",")[:count]
