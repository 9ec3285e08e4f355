"""SIGTERM, Ctrl-C, and Slurm's SIGUSR1 before its time limit: finish the step, save, leave with status 0.

A second Ctrl-C ends the process at once, without a save. A time that is over (``until``) stops like a
signal.

Ranks get a signal at slightly different moments, so each step's numbers say what any rank has heard
(``train.asked``). Where the device has begun the next step by then, that one is finished too.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from fp4pretrain.train.asked import SIGNALS, TIME
from fp4pretrain.train.hooks.checkpointing import Checkpointing
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer


class Signals(Hook):
    """Saves and stops the loop after the step in which any rank got a signal, or at ``until``.

    ``until``: seconds since 1970. ``by_signal``: whether it was a signal that stopped the loop.
    """

    def __init__(self, checkpointing: Checkpointing, *, until: float | None = None) -> None:
        self._checkpointing = checkpointing
        self._until = until
        self.by_signal = False
        self._caught = 0
        self._before: dict[int, Any] = {}

    def start(self, trainer: Trainer) -> None:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._catch)
        trainer.asked.here = self._here

    def _here(self) -> int:
        over = self._until is not None and time.time() >= self._until
        return self._caught or (TIME if over else 0)

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return trainer.asked_for == 0

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        number = trainer.asked_for
        last = trainer.step == trainer.config.train.steps
        if number == 0 or last or trainer.begun is not None:
            return
        self._checkpointing.begin(trainer)
        self._checkpointing.wait(trainer)
        trainer.stopped = True
        self.by_signal = number != TIME
        if trainer.world.is_main:
            name = signal.Signals(number).name if self.by_signal else "the time is over"
            said = "stopped, but could not save"
            if self._checkpointing.failed is None:
                said = f"saved {self._checkpointing.path}; continue with resume=auto"
            print(f"{name}: {said}", flush=True)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if self._caught == number:
                raise KeyboardInterrupt
            print(" finishing the step and saving; Ctrl-C again ends without", flush=True)
        self._caught = number
