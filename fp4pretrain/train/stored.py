"""A run as it lies on disk, for those who use its model: config, newest whole checkpoint, position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fp4pretrain.config import ModelConfig, RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.precision import Progress
from fp4pretrain.stored import read_config
from fp4pretrain.train import checkpoint
from fp4pretrain.train.run_dir import CHECKPOINTS


@dataclass(frozen=True)
class StoredRun:
    """``config`` with the checkpoint's own model section; ``step``: finished steps; ``tokens``: those
    the model was trained on; ``fingerprint``: the digest of what shaped it; ``amaxes``: what its casts
    remember of earlier steps."""

    folder: Path
    checkpoint: Path
    config: RunConfig
    step: int
    tokens: int
    fingerprint: str
    amaxes: dict[str, list[float]]

    @property
    def last_moment(self) -> Progress:
        """When the checkpoint's last step was taken: a rule that begins after it has not begun."""
        train, length = self.config.train, self.config.model.seq_length
        step = max(0, self.step - 1)
        a_step = train.global_batch * length
        return Progress(step, train.steps, max(0, self.tokens - a_step))


def stored_run(path: Path) -> StoredRun:
    """The run in a folder with its newest whole checkpoint, or of a checkpoint's folder that one.

    Raises UserError for a folder that is no run, one without a checkpoint, and where none is whole.
    """
    if (path / checkpoint.RUN).is_file():
        folder, found = path.absolute().parent.parent, path
    else:
        folder = path
        if not (folder / "config.yaml").is_file() or not (folder / CHECKPOINTS).is_dir():
            raise UserError(
                f"{path} is no run; give a folder that fp4pretrain train made, or its checkpoint"
            )
        newest = checkpoint.find(folder / CHECKPOINTS, "auto")
        if newest is None:
            raise UserError(
                f"{path} has no checkpoint yet; let the run save one (checkpoint.interval, or its end)"
            )
        found = newest
    described = checkpoint.described(found)
    config = read_config(folder)
    try:
        config.model = ModelConfig(**described["model"])
    except TypeError:
        raise UserError(
            f"{found} is of another version of fp4pretrain, with other keys of the model; use that one"
        ) from None
    read = described["consumed_samples"] - described["skipped_samples"]
    return StoredRun(
        folder=folder,
        checkpoint=found,
        config=config,
        step=described["step"],
        tokens=read * config.model.seq_length,
        fingerprint=str(described["fingerprint"].get("digest")),
        amaxes=described.get("amaxes", {}),
    )
