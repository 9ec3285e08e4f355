"""A run's folder: made once, never overwritten.

runs/NAME/
  config.yaml         the config of the last start; an earlier one that differs is config.1.yaml, ...
  fingerprint.json    what shapes the curve, with digests: of everything, of the plan, of the data
  history.json        every start: when, from which step, by which code on what, with which changes;
                      and the step at which the run was finished
  plan.txt  data.json  metrics.jsonl  checkpoints/  wandb/
  start.yaml  output.log  job.txt  .slurm/    of a sweep whose runs have processes of their own
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from fp4pretrain.baseline import WandbPath, is_recipe, wandb_path
from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path, write_text
from fp4pretrain.train import checkpoint

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
HISTORY = "history.json"
RESTART = "restart"
# What a launcher leaves before a run begins: its config, what its processes print, the Slurm job's number,
# and submitit's files.
START, LOG, JOB, SUBMITTED = "start.yaml", "output.log", "job.txt", ".slurm"
_OURS = (".lock", START, LOG, JOB, SUBMITTED)  # no sign of a run


def run_path(config: RunConfig) -> Path:
    """``run_dir``, or ``runs/NAME`` with NAME from ``name`` or the recipe and seed."""
    if config.run_dir:
        return user_path(config.run_dir, key="run_dir")
    return Path("runs") / (config.name or f"{config.precision.name}-seed{config.seed}")


def baseline_path(config: RunConfig) -> Path | WandbPath | None:
    """The folder, or the run on wandb, that ``baseline`` names; None where it names a recipe, or nothing."""
    if config.baseline is None or is_recipe(config.baseline):
        return None
    if (there := wandb_path(config.baseline)) is not None:
        return there
    return user_path(config.baseline, key="baseline")


def on_main(work: Callable[[], None], *, is_main: bool) -> None:
    """Run ``work`` on the main rank; every rank waits, and raises its UserError if it has one."""
    said: list[str | None] = [None]
    if is_main:
        try:
            work()
        except UserError as error:
            said[0] = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise UserError(said[0])


def check_free(path: Path, resume: str | None) -> None:
    """Raises UserError where a run in this folder would overwrite another, or could not write.

    A folder that holds something is for the run that made it: ``resume=auto``, or a checkpoint out
    of it. A checkpoint of another run starts a new folder.
    """
    try:
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:  # a name too long for the file system
        raise _unwritable(path, error) from None
    if not nearest.is_dir():
        raise UserError(f"run_dir: {nearest} is a file; choose another run_dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {nearest} cannot be written; choose another run_dir")
    if not path.is_dir() or not any(p.name not in _OURS for p in path.iterdir()):
        return
    own = holds_run(path)
    if resume == RESTART and own:
        _check_restart(path)
        return
    if resume is not None and own and (resume == "auto" or _within(Path(resume), path)):
        return
    cure = "continue it with resume=auto, or choose" if own and resume is None else "choose"
    holds = "exists already" if own else "holds other files than a run's"
    raise UserError(f"run_dir: {path} {holds}; {cure} another run_dir (or name)")


def holds_run(path: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (path / CHECKPOINTS).is_dir() or (path / METRICS).is_file()


def find_checkpoint(path: Path, config: RunConfig) -> Path | None:
    """The checkpoint to start from, None for a fresh start. Raises UserError where there is none
    that the run can go on from, or where those that it had are gone."""
    found = checkpoint.find(path / CHECKPOINTS, config.resume, config=config)
    if found is None and config.resume == "auto":
        _check_not_lost(path)
    return found


def starts_anew(path: Path, config: RunConfig, start: Path | None) -> bool:
    """Whether the rows in the folder are of an attempt that this one does not continue."""
    return start is None and config.resume is not None and (path / METRICS).is_file()


def prepare(
    path: Path,
    config: RunConfig,
    *,
    plan_text: str,
    unigram_entropy: float,
    fingerprint: Mapping[str, Any],
) -> None:
    """Make the folder with config.yaml, fingerprint.json, plan.txt and data.json (the validation text's
    unigram entropy, nats a token). Raises UserError where it cannot be written."""
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        _keep(path / "config.yaml", text)
        write_text(path / "config.yaml", text)
        write_text(path / "fingerprint.json", json.dumps(fingerprint, indent=1) + "\n")
        write_text(path / "plan.txt", plan_text + "\n")
        write_text(path / "data.json", json.dumps({"unigram_entropy": unigram_entropy}) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def record_start(path: Path, facts: Mapping[str, Any]) -> None:
    """Add one start to the history, with its time. Raises UserError where it cannot be written."""
    history = read_history(path) or {"saved_step": None, "starts": []}
    history.pop("finished_step", None)
    history["starts"].append({"time": round(time.time(), 3), **facts})
    _write_history(path, history)


def record_saved(path: Path, step: int) -> None:
    """Note that a checkpoint of this step was complete, so that its absence means something."""
    history = read_history(path)
    if history is not None:
        history["saved_step"] = step
        with suppress(UserError):  # a full disk ends no run
            _write_history(path, history)


def record_finished(path: Path, step: int) -> None:
    """Note that the run was trained to its end, so that a sweep can pass over it. Raises UserError."""
    history = read_history(path)
    if history is not None and history.get("finished_step") != step:
        history["finished_step"] = step
        _write_history(path, history)


def read_history(path: Path) -> dict[str, Any] | None:
    """What history.json says; None where there is none that can be read."""
    try:
        found = json.loads((path / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("starts"), list) else None


def _check_not_lost(path: Path) -> None:
    """A run that has rows and had checkpoints does not begin again by itself."""
    metrics = path / METRICS
    if not metrics.is_file() or metrics.stat().st_size == 0:
        return
    history = read_history(path)
    if history is not None and history.get("saved_step") is None:
        return  # it ended before its first checkpoint
    raise UserError(
        f"resume: {path} has rows in {METRICS} but no checkpoint to go on from; put its checkpoints "
        f"back, or begin again with resume={RESTART} (the rows are kept beside the new ones)"
    )


def _check_restart(path: Path) -> None:
    if any(checkpoint.candidates(path / CHECKPOINTS, "auto")):
        raise UserError(
            f"resume: {path} has checkpoints, which restart would leave behind; continue with "
            "resume=auto, or choose another run_dir (or name)"
        )


def _keep(file: Path, text: str) -> None:
    """Move a file that says something else to a name of its own."""
    if not file.is_file() or file.read_text(encoding="utf-8") == text:
        return
    number = 1
    while (aside := file.with_name(f"{file.stem}.{number}{file.suffix}")).exists():
        number += 1
    file.rename(aside)


def _write_history(path: Path, history: Mapping[str, Any]) -> None:
    try:
        write_text(path / HISTORY, json.dumps(history, indent=1) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from None


def _within(path: Path, folder: Path) -> bool:
    return user_path(path, key="resume").resolve().is_relative_to(folder.resolve())


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir: {path} cannot be written ({error.strerror}); choose another run_dir"
    )
