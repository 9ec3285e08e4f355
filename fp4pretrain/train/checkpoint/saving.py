"""Saving: a copy of the state, files written from it, and the rename that makes them a checkpoint.

Ranks copy their parts into host memory together, which takes what a memory copy takes; a thread of
each then writes and hashes its file while training goes on. Only ``finish``, again on every rank and
between two steps, makes a checkpoint of the files: if every rank wrote all of its part, rank 0 writes
run.json and the manifest, renames the folder and points ``latest`` at it. Whatever stops a save
before that rename leaves a hidden ``.partial`` folder, which the next start or save removes.

Threads, not processes: a killed rank must not leave a writer behind that goes on writing into the
folder of the restarted run (megatron-core 0.16 forks its writers).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp4pretrain.train.checkpoint.files import (
    Box,
    sync_folder,
    write_boxes,
    write_file,
    write_manifest,
)
from fp4pretrain.train.checkpoint.state import collect
from fp4pretrain.train.trainer import Trainer

LATEST = "latest"
RUN = "run.json"
_NAME = re.compile(r"step_(\d{8,10})")
_LEFT_OVER = (".step_*", f".{LATEST}")


class SaveError(Exception):
    """A checkpoint was not written, on any rank; the ones before it are as they were."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``last`` newest, and those of steps that ``every`` divides."""

    last: int
    every: int = 0


class Saving:
    """A save under way. Making one and every method but ``finished`` are collective."""

    def __init__(self, trainer: Trainer, folder: Path, keep: Keep) -> None:
        trainer.settle()
        self.step = trainer.step
        self._folder, self._keep, self._main = folder, keep, trainer.world.is_main
        self._device = trainer.world.device
        self._name = f"step_{trainer.step:08d}"
        self._partial = folder / f".{self._name}.partial"
        self._part: dict[str, Any] | None = None
        self._problem: str | None = None
        if self._main:
            self._problem = _attempt(self._make_folder)
        boxes, numbers = collect(trainer)
        self._run = _description(trainer) | numbers
        dist.barrier()  # the folder is there
        self._thread = threading.Thread(
            target=self._write, args=(trainer.world.rank, boxes), daemon=True
        )
        self._thread.start()

    def finished(self) -> bool:
        """Whether every rank's files are written. Collective."""
        running = torch.tensor(int(self._thread.is_alive()), device=self._device)
        dist.all_reduce(running, op=dist.ReduceOp.MAX)
        return int(running) == 0

    def finish(self) -> Path:
        """Wait for every rank's files and make them the latest checkpoint.

        Raises SaveError on all ranks where any could not write; then nothing is left of it.
        """
        self._thread.join()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self._part, self._problem))
        problem = next((text for _, text in ranks if text is not None), None)
        if self._main:
            if problem is None:
                problem = _attempt(lambda: self._publish([part for part, _ in ranks]))
            if problem is not None:
                remove_leftovers(self._folder)
        said = [problem]
        dist.broadcast_object_list(said, src=0)
        if said[0] is not None:
            raise SaveError(f"the checkpoint of step {self.step} was not written: {said[0]}")
        return self._folder / self._name

    def _make_folder(self) -> None:
        remove_leftovers(self._folder)
        self._partial.mkdir(parents=True)

    def _write(self, rank: int, boxes: list[Box]) -> None:
        path = self._partial / f"rank_{rank:05d}.safetensors"

        def write() -> None:
            self._part = write_boxes(path, boxes) if boxes else {"files": {}, "tensors": {}}

        self._problem = self._problem or _attempt(write)

    def _publish(self, parts: list[dict[str, Any]]) -> None:
        text = json.dumps(self._run, indent=1)
        entry = write_file(self._partial / RUN, [text.encode()])
        write_manifest(self._partial, [*parts, {"files": entry, "tensors": {}}])
        pointer = self._folder / f".{LATEST}"
        write_file(pointer, [f"{self._name}\n".encode()])
        final = self._folder / self._name
        if final.exists():  # of a run that went back to an earlier one
            aside = self._folder / f".{self._name}.old"
            os.replace(final, aside)
        os.replace(self._partial, final)
        os.replace(pointer, self._folder / LATEST)
        sync_folder(self._folder)
        remove_leftovers(self._folder)
        _remove_old(self._folder, step=self.step, keep=self._keep)


def save(trainer: Trainer, folder: Path, *, keep_last: int, keep_every: int = 0) -> Path:
    """Write ``folder/step_N`` and make it the latest, before training goes on.

    Checkpoints beyond the ``keep_last`` newest are removed, but for those whose step ``keep_every``
    divides. Collective: every rank calls it. Raises SaveError on all ranks.
    """
    return Saving(trainer, folder, Keep(keep_last, keep_every)).finish()


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left. For one rank, while none saves."""
    for pattern in _LEFT_OVER:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def step_of(path: Path) -> int | None:
    """The step a checkpoint's folder is named by, None for another name."""
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named else None


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoints in a folder, whole or not, ascending."""
    found = [step_of(path) for path in folder.glob("step_*") if path.is_dir()]
    return sorted(step for step in found if step is not None)


def _remove_old(folder: Path, *, step: int, keep: Keep) -> None:
    """Remove checkpoints that are too old. Those of later steps were left by a rollback, and are removed
    too."""
    steps = steps_in(folder)
    stay = {s for s in steps if keep.every and s % keep.every == 0}
    stay |= set([s for s in steps if s <= step][-keep.last :])
    for old in set(steps) - stay:
        # renamed first: a removal that is interrupted must not leave half a checkpoint
        aside = folder / f".step_{old:08d}.old"
        os.replace(folder / f"step_{old:08d}", aside)
        shutil.rmtree(aside, ignore_errors=True)


def _description(trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    return {
        "step": trainer.step,
        "consumed_samples": trainer.consumed_samples,
        "skipped_samples": trainer.skipped_samples,
        "memory": json.loads(json.dumps(trainer.memory)),  # as it is now, and JSON
        "amaxes": trainer.binding.sites.state(),
        "model": asdict(config.model),
        "recipe": config.precision.name,
        "parallel": asdict(config.parallel),
        "train": asdict(config.train),
        "fingerprint": trainer.fingerprint,
    }


def _attempt(work: Any) -> str | None:
    """Run ``work``; returns what went wrong in a few words, since a full disk must not end a run."""
    try:
        work()
    except Exception as error:  # whatever it is, the run goes on and says it
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{reason or type(error).__name__}"
    return None
