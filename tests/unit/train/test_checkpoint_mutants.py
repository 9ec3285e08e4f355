"""Damaged and hostile checkpoints: the newest good one is used, or one line says why none is.

One process, one small model and two checkpoints, of steps 2 and 4; every mutant is a copy of both
with something done to the newer one. Whatever it is, ``resume=auto`` ends with the exact state of
one of the two, each one passed over said in a line, or with one UserError.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.errors import UserError
from fp4pretrain.train import checkpoint
from fp4pretrain.train.checkpoint import files, state
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer

OLD, NEW = "step_00000002", "step_00000004"
FILES = ("manifest.json", "run.json", "rank_00000.safetensors")


@pytest.fixture(scope="module")
def saved(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a run."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    iterators = trainer.batches(0)
    for _ in range(4):
        train_step(trainer, iterators)
        if trainer.step % 2 == 0:
            checkpoint.save(trainer, folder, keep_last=9)
    return folder


@pytest.fixture(scope="module")
def states(trainer: Trainer, saved: Path) -> dict[int, list[torch.Tensor]]:
    found = {}
    for name in (OLD, NEW):
        checkpoint.load(trainer, saved / name)
        found[trainer.step] = _state(trainer)
    return found


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def _state(trainer: Trainer) -> list[torch.Tensor]:
    return [box.data for box in sorted(state.collect(trainer)[0], key=lambda b: (b.key, b.offset))]


def _resumed(trainer: Trainer, folder: Path, states: dict[int, Any]) -> tuple[int | None, list]:
    """The step that was loaded, None after a UserError, and the lines that were said."""
    said: list[str] = []
    trainer.step = -1
    try:
        loaded = checkpoint.resume(trainer, folder, "auto", say=said.append)
    except UserError as error:
        said.append(str(error))
        loaded = None
    for line in said:
        assert "\n" not in line and len(line) < 1000
        assert line.startswith("resume: "), line
    if loaded is None:
        return None, said
    assert trainer.step in states
    assert loaded.name == f"step_{trainer.step:08d}"
    now = _state(trainer)
    assert all(torch.equal(a, b) for a, b in zip(now, states[trainer.step], strict=True))
    return trainer.step, said


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def _garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(1, 2000)))


def _append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(8))


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["/nowhere", path.name, "/dev/zero"]))


def _pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever


def _of_the_other(path: Path, rng: random.Random) -> None:
    shutil.copy(path.parents[1] / OLD / path.name, path)


def _json(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(["null", "[]", "{}", "1e999", "[" * 100_000, '{"body": {}}', '"x"']))


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    _flip,
    _flip,
    _truncate,
    _remove,
    _garbage,
    _append,
    _folder,
    _link,
    _link,
    _pipe,
    _of_the_other,
    _json,
]


@pytest.mark.parametrize("seed", range(108))
def test_a_damaged_file_is_found_and_the_checkpoint_before_used(
    trainer: Trainer, states: dict[int, Any], folder: Path, seed: int
) -> None:
    rng = random.Random(seed)
    damage, name = DAMAGE[seed % len(DAMAGE)], FILES[seed // len(DAMAGE) % len(FILES)]
    damage(folder / NEW / name, rng)
    step, said = _resumed(trainer, folder, states)
    assert step == 2, said
    assert len(said) == 1
    assert NEW in said[0] and "is damaged" in said[0]


@pytest.mark.parametrize(
    ("latest", "step"),
    [
        (None, 4),
        (b"", 4),
        (b"\xff\xfe\n", 4),
        (b"../../etc\n", 4),
        (b"step_00000002/../step_00000004\n", 4),
        (b"step_" + b"9" * 4000, 4),
        (b"step_00000002\n", 2),
        (b"step_00000009\n", 4),
    ],
)
def test_latest_is_a_hint(
    trainer: Trainer, states: dict[int, Any], folder: Path, latest: bytes | None, step: int
) -> None:
    (folder / "latest").unlink()
    if latest is not None:
        (folder / "latest").write_bytes(latest)
    assert _resumed(trainer, folder, states)[0] == step


def test_a_checkpoint_that_is_not_what_its_name_says(
    trainer: Trainer, states: dict[int, Any], folder: Path
) -> None:
    """Whole, but another step's under this name; then another model's."""
    shutil.rmtree(folder / NEW)
    shutil.copytree(folder / OLD, folder / NEW)
    assert _resumed(trainer, folder, states)[0] == 2
    run = folder / NEW / "run.json"
    found = json.loads(run.read_text())
    found |= {"step": 4, "model": found["model"] | {"hidden_size": 64}}
    run.write_text(json.dumps(found))
    _sign(folder / NEW)
    step, said = _resumed(trainer, folder, states)
    assert step == 2
    assert "holds another model (model.hidden_size is 64 there and 32 here)" in said[0]


def test_none_whole_is_one_line(trainer: Trainer, states: dict[int, Any], folder: Path) -> None:
    for name in (OLD, NEW):
        _flip(folder / name / FILES[2], random.Random(0))
    step, said = _resumed(trainer, folder, states)
    assert step is None
    assert NEW in said[-1] and said[-1].endswith("resume from another checkpoint")


def test_a_damaged_path_is_not_replaced_by_another(trainer: Trainer, folder: Path) -> None:
    _flip(folder / NEW / FILES[2], random.Random(0))
    with pytest.raises(UserError, match=r"step_00000004 is damaged \(rank_00000.safetensors: its"):
        checkpoint.resume(trainer, folder, str(folder / NEW), say=print)


class Hostile:
    """A pickle of it makes a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name", [*FILES, "latest", "common.pt", ".metadata", "metadata.json", "__0_0.distcp"]
)
def test_a_hostile_pickle_is_never_run(
    trainer: Trainer, states: dict[int, Any], folder: Path, name: str, zipped: bool
) -> None:
    """In every file there is, signed as its author would sign it, and under every name under which
    megatron-core and torch would look for one."""
    mark = folder / "it ran"
    place = folder / name if name == "latest" else folder / NEW / name
    buffer = io.BytesIO()
    torch.save(Hostile(mark), buffer) if zipped else pickle.dump(Hostile(mark), buffer)
    place.write_bytes(buffer.getvalue())
    if name in FILES[1:]:
        _sign(folder / NEW)
    step, _ = _resumed(trainer, folder, states)
    assert not mark.exists()
    assert step == (2 if name in FILES else 4)
    buffer.seek(0)
    torch.load(buffer, weights_only=False) if zipped else pickle.load(buffer)
    assert mark.exists()  # it would have


def _sign(path: Path) -> None:
    """A manifest that fits the files as they are."""
    body = json.loads((path / "manifest.json").read_text())["body"]
    for name in body["files"]:
        data = (path / name).read_bytes()
        body["files"][name] = [len(data), files.hashlib.sha256(data).hexdigest()]
    signed = {"sha256": files._digest(body), "body": body}
    (path / "manifest.json").write_text(json.dumps(signed))
