"""Jobs of a rank around checkpoints, for ``worker``: ``checkpoint_tasks.NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from started import started

from fp4pretrain.train import checkpoint
from fp4pretrain.train.checkpoint import loading, saving
from fp4pretrain.train.checkpoint.files import Damaged
from fp4pretrain.train.hooks import Deoscillating
from fp4pretrain.train.initial import load_initial
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer


class _Silent:
    """The part of Logging that the hook needs."""

    def write(self, row: dict[str, Any]) -> None:
        assert row["reset_share"] > 0


def steps_of(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    iterators = trainer.batches(trainer.consumed_samples)
    rows = []
    hook = Deoscillating(_Silent())
    hook.start(trainer)
    for _ in range(steps):
        trainer.binding.apply(trainer.progress)
        rows.append(train_step(trainer, iterators))
        hook.after_step(trainer, rows[-1])
    return rows


def begin(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Train ``steps``, save, train as many again."""
    trainer = started(overrides, device)
    trainer.memory["what"] = [1, "2"]
    before = steps_of(trainer, steps)
    path = checkpoint.save(trainer, Path(out), keep_last=9)
    return {"checkpoint": str(path), "rows": before + steps_of(trainer, steps)}


def go_on(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Load what ``resume`` names, save it as it was loaded, train ``steps``."""
    trainer = started(overrides, device)
    loaded = checkpoint.resume(trainer, Path(out), trainer.config.resume, say=lambda text: None)
    assert loaded is not None
    path = checkpoint.save(trainer, Path(out), keep_last=9)
    return {"checkpoint": str(path), "rows": steps_of(trainer, steps)}


def begin_with(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Read the weights that ``init`` names, save them at once."""
    trainer = started(overrides, device)
    load_initial(trainer, str(trainer.config.init))
    return {"checkpoint": str(checkpoint.save(trainer, Path(out), keep_last=9))}


def held(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Bytes of weights, gradients, masters and moments on each rank after a step."""
    trainer = started(overrides, device)
    steps_of(trainer, 1)
    mine = bytes_held(trainer)
    everyone: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyone, mine)
    return {"held": everyone}


def bytes_held(trainer: Trainer) -> dict[str, int]:
    """Of storages, each counted once: what is a view of another holds nothing."""
    weights = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    gradients = [b.grad_data for chunk in trainer.chunks for b in chunk.buffers]
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    inner = [part.optimizer for part in parts]
    masters = [p for one in inner for group in one.param_groups for p in group["params"]]
    moments = [
        state[name] for one in inner for state in one.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]  # fmt: skip
    seen: set[int] = set()
    found = {}
    for name, tensors in (
        ("weights", weights), ("gradients", gradients), ("masters", masters), ("moments", moments)
    ):  # fmt: skip
        found[name] = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[name] += storage.nbytes()
    return found


def two_saves(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """Checkpoints of steps 1 and 2."""
    trainer = started(overrides, device)
    for _ in range(2):
        steps_of(trainer, 1)
        checkpoint.save(trainer, Path(out), keep_last=9)
    return {"folder": out}


def fault_in_reading(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """The last rank alone finds the newest checkpoint wrong: when it compares checksums, when it
    reads tensors, when it reads run.json. What each rank says and loads."""
    trainer = started(overrides, device)
    folder = Path(trainer.config.resume or "")
    heard = []
    for place in ("check_file", "restore", "_described"):
        whole, said = getattr(loading, place), []

        def faulty(*args: Any, whole: Any = whole, place: str = place, **kwargs: Any) -> Any:
            path = next(a for a in args if isinstance(a, Path))
            if path.name == "step_00000002" and trainer.world.rank == trainer.world.size - 1:
                if place == "restore":
                    kwargs["agree"]("a disk that cannot be read")
                if place == "_described":
                    raise loading.Unusable(f"resume: {path} is damaged (no such file)")
                raise Damaged("a disk that cannot be read")
            return whole(*args, **kwargs)

        setattr(loading, place, faulty)
        try:
            loaded = checkpoint.resume(trainer, folder, str(folder), say=said.append)
        finally:
            setattr(loading, place, whole)
        heard.append({"place": place, "loaded": loaded and loaded.name, "said": said})
    everyone: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyone, heard)
    return {"heard": everyone}


def fault_in_writing(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """The last rank alone cannot write: what each rank is told, and what is left afterwards."""
    trainer = started(overrides, device)
    folder = Path(out) / "checkpoints"
    steps_of(trainer, 1)
    checkpoint.save(trainer, folder, keep_last=9)
    steps_of(trainer, 1)
    whole = saving.write_boxes

    def faulty(*args: Any) -> Any:
        if trainer.world.rank == trainer.world.size - 1:
            raise OSError(28, "No space left on device")
        return whole(*args)

    saving.write_boxes = faulty
    try:
        checkpoint.save(trainer, folder, keep_last=9)
        told = "nothing"
    except checkpoint.SaveError as error:
        told = str(error)
    finally:
        saving.write_boxes = whole
    everyone: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyone, told)
    left = sorted(p.name for p in folder.iterdir())
    return {"told": everyone, "left": left, "latest": (folder / "latest").read_text()}
