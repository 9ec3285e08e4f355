"""The files of a checkpoint: tensors as safetensors, everything else as JSON; no pickle anywhere.

A pickle is a program, and reading one runs it. torch's and megatron-core's own formats keep their
index, and what is no tensor, in pickles; so only megatron-core's description of shards is used here
(which box of which whole tensor a rank holds), and the boxes lie in a format that cannot run:

    rank_00003.safetensors   the boxes rank 3 wrote, named KEY[offsets]; any safetensors reader opens it
    manifest.json            every file's size and SHA-256, every tensor's dtype, shape and boxes, and
                             a SHA-256 of all that

A reader goes by the manifest alone and believes none of it: names stay inside the folder, boxes
inside their files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
_FORMAT = 1
_SLICE = 1 << 26  # bytes hashed and written at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(Exception):
    """A file of a checkpoint is not what was written. The message names it and what is wrong."""


@dataclass(frozen=True)
class Box:
    """A part of the whole tensor ``key`` of ``shape``: ``data`` begins at ``offset`` in it."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


@dataclass(frozen=True)
class Stored:
    """Where a box lies: ``begin`` is its first byte in ``file``."""

    file: str
    begin: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A whole tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Stored, ...]


@dataclass(frozen=True)
class Manifest:
    """``files``: name -> (bytes, SHA-256). ``tensors``: key -> Tensor."""

    files: dict[str, tuple[int, str]]
    tensors: dict[str, Tensor]


def write_boxes(path: Path, boxes: list[Box]) -> dict[str, Any]:
    """Write a safetensors file and force it to the disk; returns its part of the manifest.

    Raises OSError where the disk does.
    """
    boxes = sorted(boxes, key=lambda box: -box.data.element_size())  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"writer": "fp4pretrain"}}
    end = 0
    for box in boxes:
        begin, end = end, end + box.data.nbytes
        header[f"{box.key}{list(box.offset)}"] = {
            "dtype": _NAMES[box.data.dtype],
            "shape": list(box.data.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entry = write_file(path, _pieces(len(text).to_bytes(8, "little") + text, boxes))
    tensors: dict[str, Any] = {}
    for box, place in zip(boxes, list(header.values())[1:], strict=True):
        tensor = {"dtype": place["dtype"], "shape": list(box.shape), "boxes": []}
        tensors.setdefault(box.key, tensor)["boxes"].append(
            [path.name, start + place["data_offsets"][0], list(box.offset), place["shape"]]
        )
    return {"files": entry, "tensors": tensors}


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and force to the disk; returns {name: [bytes, SHA-256]}."""
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return {path.name: [size, digest.hexdigest()]}


def _pieces(head: bytes, boxes: list[Box]) -> Iterator[bytes | memoryview]:
    yield head
    for box in boxes:
        raw = _bytes(box.data.contiguous())
        for first in range(0, len(raw), _SLICE):
            yield raw[first : first + _SLICE]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_manifest(folder: Path, parts: list[dict[str, Any]]) -> None:
    """Join the ranks' parts into ``manifest.json``. Raises OSError."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        files |= part["files"]
        for key, tensor in part["tensors"].items():
            boxes = tensors.setdefault(key, {**tensor, "boxes": []})["boxes"]
            boxes.extend(tensor["boxes"])
    body = {"format": _FORMAT, "files": files, "tensors": tensors}
    text = json.dumps({"sha256": _digest(body), "body": body})
    write_file(folder / MANIFEST, [text.encode()])
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Raises Damaged where it is missing, altered or impossible, or a file's size is another."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise ValueError("no regular file")
        found = json.loads(path.read_bytes())
        body = found["body"]
        if found["sha256"] != _digest(body):
            raise ValueError("its checksum differs")
        if body["format"] != _FORMAT:
            raise ValueError(f"its format is {body['format']}")
        files = {name: (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        tensors = {
            key: _tensor(entry["dtype"], entry["shape"], entry["boxes"], files=files)
            for key, entry in body["tensors"].items()
        }
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: {error or type(error).__name__}".splitlines()[0]) from None
    for name, (size, _) in files.items():
        _check_size(folder / name, size)
    return Manifest(files, tensors)


def _tensor(dtype: str, shape: Any, boxes: Any, *, files: dict[str, tuple[int, str]]) -> Tensor:
    stored = []
    for file, begin, offset, extent in boxes:
        numbers = (begin, *shape, *offset, *extent)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or Path(file).name != file:
            raise ValueError("a place that cannot be")
        if not len(shape) == len(offset) == len(extent):
            raise ValueError("a box of other dimensions than its tensor's")
        if begin + math.prod(extent) * DTYPES[dtype].itemsize > files[file][0]:
            raise ValueError("a place outside its file")
        stored.append(Stored(file, begin, tuple(offset), tuple(extent)))
    return Tensor(DTYPES[dtype], tuple(shape), tuple(stored))


def _check_size(path: Path, size: int) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise Damaged(f"{path.name}: {status.st_size} bytes in place of {size}")


def check_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Compare a file's size and SHA-256 with the manifest. Raises Damaged."""
    size, digest = manifest.files[name]
    _check_size(folder / name, size)
    try:
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from None
    if found != digest:
        raise Damaged(f"{name}: its checksum differs")


def read_box(folder: Path, box: Stored, dtype: torch.dtype) -> torch.Tensor:
    """One box, on the CPU. Raises Damaged where the file ends before it does."""
    data = torch.empty(box.shape, dtype=dtype, device="cpu")
    try:
        with (folder / box.file).open("rb") as file:
            file.seek(box.begin)
            read = file.readinto(_bytes(data)) if data.numel() else 0
    except OSError as error:
        raise Damaged(f"{box.file}: {error.strerror}") from None
    if read != data.nbytes:
        raise Damaged(f"{box.file}: it ends before the tensors do")
    return data


def read_part(folder: Path, tensor: Tensor, *, offset: tuple[int, ...], out: torch.Tensor) -> None:
    """Fill ``out``, the part of a whole tensor that begins at ``offset``, from the boxes it meets.

    What lies outside the stored whole (a vocabulary padded further here) becomes zero. Raises
    Damaged where a stored part is in no box.
    """
    wanted = 1
    for begin, length, end in zip(offset, out.shape, tensor.shape, strict=True):
        wanted *= max(0, min(begin + length, end) - begin)
    if wanted < out.numel():
        out.zero_()
    filled = 0
    for box in tensor.boxes:
        here, there = [], []
        for begin, length, first, extent in zip(
            offset, out.shape, box.offset, box.shape, strict=True
        ):
            low, high = max(begin, first), min(begin + length, first + extent)
            here.append(slice(low - begin, high - begin))
            there.append(slice(low - first, high - first))
        if all(s.stop > s.start for s in here):
            part = read_box(folder, box, tensor.dtype)[tuple(there)]
            out[tuple(here)].copy_(part)
            filled += part.numel()
    if filled != wanted:
        raise Damaged(f"{MANIFEST}: a tensor has {filled} elements in place of {wanted}")


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
