"""The files of a checkpoint, without a model: what is written is read, and nothing else is."""

from __future__ import annotations

import ast
import json
import math
import random
from pathlib import Path

import pytest
import torch

from fp4pretrain.train import checkpoint
from fp4pretrain.train.checkpoint.files import (
    DTYPES,
    Box,
    Damaged,
    check_file,
    read_manifest,
    read_part,
    write_boxes,
    write_manifest,
)
from fp4pretrain.train.checkpoint.shards import rectangles


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)


def _pieces(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """A whole cut once along each axis."""
    parts: list[tuple[slice, ...]] = [()]
    for length in shape:
        cut = rng.randint(0, length)
        halves = [s for s in (slice(0, cut), slice(cut, length)) if s.stop > s.start]
        parts = [(*part, half) for part in parts for half in halves]
    return parts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5)], ids=str)
def test_what_is_cut_one_way_is_read_another(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rng = random.Random(str((shape, dtype)))
    whole = _tensor(shape, dtype)
    boxes = [
        Box("w", shape, tuple(s.start for s in part), whole[part]) for part in _pieces(rng, shape)
    ]
    shares = [boxes[:1], boxes[1:]]
    parts = [write_boxes(tmp_path / f"rank_{r}.safetensors", b) for r, b in enumerate(shares)]
    write_manifest(tmp_path, parts)
    manifest = read_manifest(tmp_path)
    for name in manifest.files:
        check_file(tmp_path, name, manifest)
    for part in _pieces(rng, shape):
        out = torch.zeros_like(whole[part])
        read_part(tmp_path, manifest.tensors["w"], offset=tuple(s.start for s in part), out=out)
        assert torch.equal(out, whole[part])


def test_rows_beyond_the_stored_whole_are_zero_and_a_hole_is_damage(tmp_path: Path) -> None:
    """A vocabulary padded further than where it was saved; a box that is missing."""
    whole = _tensor((4, 3), torch.float32)
    write_manifest(tmp_path, [write_boxes(tmp_path / "a", [Box("w", (4, 3), (0, 0), whole)])])
    out = torch.ones(6, 3)
    read_part(tmp_path, read_manifest(tmp_path).tensors["w"], offset=(0, 0), out=out)
    assert torch.equal(out, torch.cat([whole, torch.zeros(2, 3)]))
    write_manifest(tmp_path, [write_boxes(tmp_path / "a", [Box("w", (5, 3), (0, 0), whole)])])
    with pytest.raises(Damaged, match="12 elements in place of 15"):
        read_part(tmp_path, read_manifest(tmp_path).tensors["w"], offset=(0, 0), out=out)


def test_any_safetensors_reader_opens_the_file(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.torch", reason="a reader of others, not required")
    one, two = _tensor((3, 2), torch.bfloat16), _tensor((5,), torch.float32)
    write_boxes(tmp_path / "f", [Box("a", (6, 2), (3, 0), one), Box("b", (5,), (0,), two)])
    found = numpy.load_file(tmp_path / "f")
    assert found.keys() == {"a[3, 0]", "b[0]"}
    assert torch.equal(found["a[3, 0]"], one)
    assert torch.equal(found["b[0]"], two)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(0, "../f"),
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(1, -8),
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(1, 1 << 60),
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(3, [1 << 40, 3]),
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(2, [-1, 0]),
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(2, [0]),
        lambda body: body["tensors"]["w"]["boxes"][0].__setitem__(3, [4.0, 3]),
        lambda body: body["tensors"]["w"].__setitem__("shape", [4]),
        lambda body: body["tensors"]["w"].__setitem__("dtype", "pickle"),
        lambda body: body["tensors"].__setitem__("w", None),
        lambda body: body.__setitem__("format", 2),
        lambda body: body["files"].__setitem__("f", [1]),
    ],
)
def test_a_manifest_is_not_believed(tmp_path: Path, change: object) -> None:
    """Even with a checksum that fits, as whoever altered it on purpose would write."""
    whole = _tensor((4, 3), torch.float32)
    part = write_boxes(tmp_path / "f", [Box("w", (4, 3), (0, 0), whole)])
    write_manifest(tmp_path, [part])
    body = json.loads((tmp_path / "manifest.json").read_text())["body"]
    change(body)  # type: ignore[operator]  # of the case
    digest = checkpoint.files._digest(body)  # type: ignore[attr-defined]  # private
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))
    with pytest.raises(Damaged, match=r"manifest\.json: "):
        read_manifest(tmp_path)


def test_nothing_that_reads_a_checkpoint_can_unpickle() -> None:
    """No call of these rooms' names that would: the promise is kept by what is absent."""
    for file in Path(checkpoint.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not imported & {"pickle", "dill", "torch.distributed.checkpoint"}, file
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}, file


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)], ids=str)
def test_a_run_of_elements_is_boxes_in_their_order(shape: tuple[int, ...]) -> None:
    """What a data-parallel rank holds of a parameter, for every beginning and end."""
    count = math.prod(shape)
    whole = torch.arange(count).view(shape)
    for low in range(count + 1):
        for high in range(low, count + 1):
            boxes = [
                whole[tuple(slice(a, a + n) for a, n in zip(offset, extent, strict=True))]
                for offset, extent in rectangles(shape, low, high)
            ]
            found = torch.cat([whole.new_empty(0), *(box.reshape(-1) for box in boxes)])
            assert torch.equal(found, torch.arange(low, high))
            assert len(boxes) <= 2 * len(shape) - 1
