"""Going back to a checkpoint inside a running process, so that a restart goes the same way.

    runs/NAME/rollbacks.json    one entry for each time a run went back

What a checkpoint holds of the data position and of the guard is from before the trouble. So an entry
says where the run goes on from it: the run itself reads it right after loading, and a process that is
started later from the same checkpoint does the same. Without it a run killed between a rollback and
its next save would meet the same data again, and forget how often it has gone back.

The order of the writes makes every moment safe to be killed in: first ``latest`` names the older
checkpoint (a run started now repeats the trouble, and goes back again), then the entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text
from fp4pretrain.train import checkpoint
from fp4pretrain.train.checkpoint.saving import step_of
from fp4pretrain.train.trainer import Trainer

_RECORD = "rollbacks.json"


@dataclass(frozen=True)
class Entry:
    """Where a run goes on after it went back from ``from_step`` to the checkpoint of ``to_step``.

    ``rollbacks``: how many there are with this one; ``memory`` is the guard's from then on.
    """

    rollbacks: int
    from_step: int
    to_step: int
    consumed_samples: int
    skipped_samples: int
    memory: dict[str, Any]


def entries(run: Path) -> list[Entry]:
    """All entries of a run's folder, oldest first. Raises UserError where they cannot be read."""
    path = run / _RECORD
    try:
        return [Entry(**one) for one in json.loads(path.read_bytes())] if path.is_file() else []
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"resume: {path} is damaged ({type(error).__name__}); remove it to forget which data the "
            "run has passed over, or choose another run_dir"
        ) from None


def entry_for(run: Path, *, step: int, rollbacks: int) -> Entry | None:
    """The newest entry that a state at ``step``, which knows of ``rollbacks``, has not seen yet."""
    found = [e for e in entries(run) if e.to_step == step and e.rollbacks > rollbacks]
    return found[-1] if found else None


def record(run: Path, entry: Entry) -> None:
    """Add an entry. It replaces entries with its number or a higher one: they were written after the
    step that the run has now been rolled back to."""
    kept = [e for e in entries(run) if e.rollbacks < entry.rollbacks]
    text = json.dumps([asdict(e) for e in [*kept, entry]], indent=1)
    write_text(run / _RECORD, text, sync=True)


def load_good(
    trainer: Trainer, folder: Path, *, good_step: int, say: Callable[[str], None]
) -> Path | None:
    """Load the newest checkpoint up to ``good_step`` that is whole, and make it the latest.

    None, with nothing changed, where there is none. Collective; rank 0 says which there are. Raises
    UserError where there are some and none can be loaded.
    """
    said: list[list[Path]] = [[]]
    if trainer.world.is_main:
        said[0] = [p for p in checkpoint.candidates(folder, "auto") if _step(p) <= good_step]
    dist.broadcast_object_list(said, src=0)
    for path in said[0]:
        try:
            checkpoint.load(trainer, path, own=True)
        except UserError as error:
            if path == said[0][-1]:
                raise
            say(f"{error}; trying the one before it")
            continue
        if trainer.world.is_main:
            write_text(folder / checkpoint.LATEST, f"{path.name}\n")
        return path
    return None


def _step(path: Path) -> int:
    step = step_of(path)
    assert step is not None, path  # candidates are named by their steps
    return step
