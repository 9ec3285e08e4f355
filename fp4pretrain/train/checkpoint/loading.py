"""Which checkpoint a run goes on from, whether it is whole, and loading it.

Every file is compared with the manifest's SHA-256 before anything is believed, the files shared out
over the ranks; what one rank finds wrong is wrong for all. ``resume=auto`` then takes the newest
checkpoint before that one which is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp4pretrain import fingerprint
from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path
from fp4pretrain.train.changes import changes
from fp4pretrain.train.checkpoint.files import Damaged, Manifest, check_file, read_manifest
from fp4pretrain.train.checkpoint.saving import LATEST, RUN, step_of, steps_in
from fp4pretrain.train.checkpoint.state import restore
from fp4pretrain.train.trainer import Trainer

_DESCRIBED = {
    "step": int,
    "consumed_samples": int,
    "skipped_samples": int,
    "memory": dict,
    "model": dict,
    "train": dict,
    "optimizer_step": float,
    "schedule_step": int,
}
_NO_CHECKPOINT = (None, "restart")


class Unusable(UserError):
    """A checkpoint that is damaged or of another model: ``resume=auto`` takes one before it."""


def candidates(folder: Path, resume: str | None) -> list[Path]:
    """The checkpoints that ``resume`` may mean, best first: for None and ``restart`` none, for ``auto``
    or a run's folder the latest and those before it (none in a folder without any), for a path itself.

    Raises UserError for a path that is no checkpoint.
    """
    if resume in _NO_CHECKPOINT:
        return []
    assert resume is not None
    if resume == "auto":
        return _newest_first(folder)
    path = user_path(resume, key="resume")
    if (path / folder.name).is_dir():
        path = path / folder.name  # a run's folder stands for its checkpoints
    if (path / RUN).is_file():
        return [path]
    found = _newest_first(path) if path.is_dir() else []
    if not found:
        raise UserError(f"resume: {resume} is no checkpoint; give auto or a .../step_N folder")
    return found


def _newest_first(folder: Path) -> list[Path]:
    steps = steps_in(folder)
    newest = _latest(folder)
    if newest is not None:
        steps = [step for step in steps if step < newest] + [newest]
    return [folder / f"step_{step:08d}" for step in reversed(steps)]


def _latest(folder: Path) -> int | None:
    """The step that ``latest`` names; None where it is missing or names nothing."""
    path = folder / LATEST
    try:
        return (
            step_of(folder / path.read_text(encoding="utf-8")[:100].strip())
            if path.is_file()
            else None
        )
    except (OSError, ValueError):
        return None


def find(folder: Path, resume: str | None, *, config: RunConfig | None = None) -> Path | None:
    """The newest checkpoint ``resume`` may mean whose files are all there, by name and size, and that
    ``config`` can go on from. For one rank: nothing is communicated.

    Raises UserError for a path that is no checkpoint, where none is whole, and as ``check_model``.
    """

    def attempt(path: Path) -> None:
        described(path) if config is None else check_model(path, config)

    return _first_good(candidates(folder, resume), attempt)


def described(path: Path) -> dict[str, Any]:
    """What ``run.json`` of a checkpoint says: step, consumed_samples, model, fingerprint, ...

    Raises UserError where it or another file is missing or visibly damaged.
    """
    return _described(path)[0]


def _described(path: Path) -> tuple[dict[str, Any], Manifest]:
    try:
        manifest = read_manifest(path)
        check_file(path, RUN, manifest)
        found = json.loads((path / RUN).read_bytes())
        if isinstance(found, dict) and "fingerprint" not in found:
            raise UserError(
                f"resume: {path} is of an earlier version, which read its data in another order; "
                "continue it with that version, or start anew in another run_dir"
            )
        _check_fingerprint(found["fingerprint"])
        for key, kind in _DESCRIBED.items():
            if not isinstance(found[key], kind):
                raise Damaged(f"{RUN}: {key} is no {kind.__name__}")
            if kind in (int, float) and not 0 <= found[key] < 2**53:
                raise Damaged(f"{RUN}: {key} is {found[key]}")
        if step_of(path) not in (None, found["step"]):
            raise Damaged(f"{RUN}: it is of step {found['step']}")
    except Damaged as damage:
        raise _damaged(path, str(damage)) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{RUN}: {type(error).__name__}") from None
    return found, manifest


def _check_fingerprint(found: Any) -> None:
    for part in ("entries", "precision", "data"):
        if not isinstance(found[part], dict):
            raise Damaged(f"{RUN}: fingerprint.{part} is no dict")
    for key in ("train.steps", "optim.decay", "optim.warmup"):
        if not isinstance(found["entries"][key], int | None):
            raise Damaged(f"{RUN}: {key} is no number")
    if not isinstance(found["plan"], str):
        raise Damaged(f"{RUN}: plan is no digest")
    sets = found["data"][fingerprint.VALIDATION]
    if not all(isinstance(one["digest"], str) for one in sets.values()):
        raise Damaged(f"{RUN}: a validation set has no digest")
    if not isinstance(found["data"][fingerprint.ORDER], str):
        raise Damaged(f"{RUN}: {fingerprint.ORDER} is no digest")


def _damaged(path: Path, what: str) -> Unusable:
    return Unusable(f"resume: {path} is damaged ({what}); resume from another checkpoint")


def check_model(path: Path, config: RunConfig) -> dict[str, Any]:
    """``described`` of a checkpoint that ``config`` can go on from, as far as that is known before the
    data is read.

    Raises UserError for another model, for a run that is over before it, and for another experiment
    that ``resume_with`` does not name.
    """
    found, _ = _described(path)
    _check(path, found, config)
    changes(path, found, config)
    return found


def _check(path: Path, found: dict[str, Any], config: RunConfig) -> None:
    there = {"implementation": "fp4pretrain"} | found["model"]  # a key that came later
    for key, value in asdict(config.model).items():
        if there.get(key) != value:
            raise Unusable(
                f"resume: {path} holds another model (model.{key} is {there.get(key)} "
                f"there and {value} here); set model.{key} or resume another run"
            )
    if found["step"] > config.train.steps:
        raise UserError(
            f"train.steps: {path} is of step {found['step']}, after the end of this run; raise "
            f"train.steps={config.train.steps} or resume an earlier checkpoint"
        )


def _check_dtype(path: Path, manifest: Manifest, here: str) -> None:
    """Raises Unusable where the weights were kept in another type than ``optim.params_dtype`` says."""
    weights = [
        t
        for key, t in manifest.tensors.items()
        if not key.startswith(("optimizer.", "paths.", "rng."))
    ]
    kinds = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    there = {kinds.get(tensor.dtype) for tensor in weights}
    if len(there) == 1 and there != {here}:
        raise Unusable(
            f"optim.params_dtype: {path} holds weights in {there.pop()} and this run's are in {here}; "
            "set optim.params_dtype to theirs, or resume another run"
        )


def load(trainer: Trainer, path: Path, *, own: bool = False) -> None:
    """Continue from a checkpoint: weights, optimizer, schedule, position in the data, memory.

    ``own``: this process may go back to it as it is; otherwise it must be of the same experiment but
    for what ``resume_with`` names. Collective. Raises UserError on all ranks, for a checkpoint of
    another model or experiment and for damage that any rank sees; the trainer is as it was unless the
    damage came while tensors were read.
    """
    try:
        found, manifest = _described(path)
        _check(path, found, trainer.config)
        _check_dtype(path, manifest, trainer.config.optim.params_dtype)
        if not own:
            changes(path, found, trainer.config, data=trainer.fingerprint["data"])
    except UserError as error:
        _agree(error)
        raise
    _agree(None)
    world = trainer.world

    def agree(problem: str | None) -> None:
        _agree(None if problem is None else _damaged(path, problem))

    agree(_wrong_file(path, manifest, names=sorted(manifest.files)[world.rank :: world.size]))
    restore(trainer, path, manifest, numbers=found, agree=agree)
    trainer.step = found["step"]
    trainer.consumed_samples = found["consumed_samples"]
    trainer.skipped_samples = found["skipped_samples"]
    trainer.memory = found["memory"]
    trainer.binding.sites.restore(found.get("amaxes", {}), found["step"])
    trainer.clock.weights_changed()


def resume(
    trainer: Trainer, folder: Path, resume: str | None, *, say: Callable[[str], None]
) -> Path | None:
    """``load`` the first of ``candidates`` that is whole; None where there is none to load.

    ``say`` gets a line for each that is passed over. Collective, and rank 0 says which candidates
    there are. Raises UserError where there are some and none is whole.
    """
    said: list[Any] = [None]
    if trainer.world.is_main:
        try:
            said[0] = candidates(folder, resume)
        except UserError as error:
            said[0] = error
    dist.broadcast_object_list(said, src=0)
    if isinstance(said[0], UserError):
        raise said[0]
    return _first_good(said[0], lambda path: load(trainer, path), say=say)


def _first_good(
    paths: list[Path], attempt: Callable[[Path], Any], *, say: Callable[[str], None] | None = None
) -> Path | None:
    """The first path that ``attempt`` accepts. Where it refuses all, raises what it raised for the first."""
    refused: Unusable | None = None
    for path in paths:
        try:
            attempt(path)
        except Unusable as error:
            refused = refused or error
            if say is not None and path != paths[-1]:
                say(f"{error}; trying the one before it")
            continue
        return path
    if refused is not None:
        raise refused
    return None


def _wrong_file(path: Path, manifest: Manifest, *, names: list[str]) -> str | None:
    try:
        for name in names:
            check_file(path, name, manifest)
    except Damaged as damage:
        return str(damage)
    return None


def _agree(problem: UserError | None) -> None:
    """Raise on all ranks the first problem that any rank has."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found
