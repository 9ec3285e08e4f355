"""A run that hangs writes its stacks on every rank, and ends so that it can be restarted.

Collectives wait: one rank that stands still stops all of them, and none fails for minutes. A thread of
each rank counts the time since the last step. It needs no word from the main thread, which in a
collective, a system call or CUDA's driver has let go of Python's lock. When the time is over:

1. The rank appends the stacks of all its threads to ``stacks/rank_N.txt``.
2. A hidden file there tells the other ranks, whose time may not be over yet; they do as much.
3. After a moment for that, each rank ends with status 75 and torchrun starts the run again.

Time in which the process itself was stopped (Ctrl-Z, a suspended laptop) does not count.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fp4pretrain.config import GuardConfig
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
# The first step compiles kernels and opens connections; evaluation and saving take many steps' time.
_SLOW = 10
_LONGEST_TICK = 5.0
_TICKS_TO_LEAVE = 3


class Watchdog(Hook):
    """Runs as the first hook. What hooks do after a step (evaluate, save) is given ten times as long as a
    step."""

    def __init__(self, folder: Path, logging: Logging, settings: GuardConfig) -> None:
        self._folder = folder
        self._logging = logging
        self._timeout = settings.hang_timeout
        self._restart = settings.hang_action == "restart"
        self._tick = min(self._timeout / 10, _LONGEST_TICK)
        self._limit = self._timeout * _SLOW
        self._signs = 0  # of life; only the main thread counts them
        self._stepped = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, trainer: Trainer) -> None:
        if self._timeout == 0:
            return
        # a name that no earlier process of this run has used
        name = [f".hang-{time.time_ns()}"]
        if trainer.world.is_main:
            self._remove_signals()
        dist.broadcast_object_list(name, src=0)
        self._thread = threading.Thread(target=self._watch, args=(trainer, name[0]), daemon=True)
        self._thread.start()

    def before_step(self, trainer: Trainer) -> None:
        self._alive(self._timeout if self._stepped else self._timeout * _SLOW)

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._stepped = True
        self._alive(self._timeout * _SLOW)

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return True

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._remove_signals()

    def _alive(self, limit: float) -> None:
        self._limit = limit
        self._signs += 1

    def _watch(self, trainer: Trainer, name: str) -> None:
        signs, waited, told = -1, 0.0, -1
        before = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            passed, before = now - before, now
            if signs != self._signs:
                signs, waited = self._signs, 0.0
                continue
            waited += min(passed, 2 * self._tick)
            signal = self._folder / f"{name}-{trainer.step}"
            if trainer.step != told and (waited > self._limit or signal.exists()):
                told = trainer.step
                self._report(trainer, signal, waited)

    def _report(self, trainer: Trainer, signal: Path, waited: float) -> None:
        rank = trainer.world.rank
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{rank}.txt").open("a", encoding="utf-8") as file:
            file.write(
                f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {rank}, process {os.getpid()} on "
                f"{socket.gethostname()}: {waited:.0f} s after step {trainer.step}\n"
            )
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        signal.touch()
        if trainer.world.is_main:
            self._say(trainer, waited)
        if self._restart:
            self._closed.wait(self._tick * _TICKS_TO_LEAVE)
            os._exit(STATUS)

    def _say(self, trainer: Trainer, waited: float) -> None:
        then = f"ending with status {STATUS} for a restart" if self._restart else "waiting on"
        print(
            f"fp4pretrain: guard.hang_timeout: nothing for {waited:.0f} s after step {trainer.step}; "
            f"the stacks of all ranks are in {self._folder}; {then}",
            file=sys.stderr,
            flush=True,
        )
        row = {"event": "hang", "step": trainer.step, "tokens": trainer.tokens, "seconds": waited}
        # in a thread of its own: it may be a sink that hangs
        writing = threading.Thread(target=self._logging.write, args=(row,), daemon=True)
        writing.start()
        writing.join(self._tick)

    def _remove_signals(self) -> None:
        for path in self._folder.glob(".hang-*"):
            path.unlink(missing_ok=True)
