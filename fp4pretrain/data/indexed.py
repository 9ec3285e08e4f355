"""Megatron's indexed dataset on disk: written as a whole or not at all, and checked before it is read.

A dataset is a path prefix. ``PREFIX.bin`` holds the tokens of all documents end to end,
``PREFIX.idx`` the length and the byte offset of each. We add ``PREFIX.json``, which says whose
tokens they are, so that a run with another tokenizer is refused, and has the ``manifest``; a dataset made
by Megatron-LM's own tools has none and is taken as it is. ``PREFIX.prompts`` is there where documents
begin with prompts, which are read and not predicted.

megatron-core checks an index by assertion and a ``.bin`` not at all: a truncated one would fail in
the middle of a run, on one rank. `read_index` reads the same bytes first, in microseconds.
"""

from __future__ import annotations

import array
import json
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.data.manifest import FILES, check_sizes, described
from fp4pretrain.data.tokenizers import Tokenizer
from fp4pretrain.errors import UserError
from fp4pretrain.files import unwritable, write_text

PROMPTS = ".prompts"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# megatron.core.datasets.indexed_dataset.DType, less the two float codes: tokens are integers.
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(kind): code for code, kind in _DTYPES.items()}
_UINT16_IDS = 65500  # megatron-core stores vocabularies from here on as int32
_LONGEST = 2**31 - 1  # tokens of a document: the index holds lengths as int32
_MARKS = 1 << 20  # documents whose index is checked or written at once
_META_BYTES = 1 << 20  # more than any PREFIX.json of ours
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class DatasetIndex:
    """The facts of one indexed dataset.

    Attributes:
        prefix: path without .bin or .idx.
        dtype: of the tokens in the .bin file.
        pointers: [documents] int64, the byte of the .bin where each document begins; on disk.
        tokens: how many there are.
        meta: what PREFIX.json says; empty where there is none.
        prompts: [documents] int32, how many tokens at the beginning of each are not to be predicted; None
            where all are.
    """

    prefix: str
    dtype: np.dtype[Any]
    pointers: NDArray[np.int64]
    tokens: int
    meta: dict[str, Any]
    prompts: NDArray[np.int32] | None = None

    @property
    def documents(self) -> int:
        return len(self.pointers)

    @property
    def size_bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    def offset(self, document: int) -> int:
        """How many tokens stand before `document`, which may be one past the last."""
        if document == self.documents:
            return self.tokens
        return int(self.pointers[document]) // self.dtype.itemsize

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.pointers, append=self.size_bytes) // self.dtype.itemsize

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Tokens [begin, end) as they lie in the .bin."""
        return np.fromfile(
            f"{self.prefix}.bin", self.dtype, end - begin, offset=begin * self.dtype.itemsize
        )


def read_index(prefix: str, *, key: str = "data.path") -> DatasetIndex:
    """Read and check PREFIX.idx, and the size of PREFIX.bin against it.

    Raises:
        UserError: a file is missing, cannot be read, is not an indexed dataset, is cut short, or has
            an index whose documents do not follow each other.
    """
    try:
        return _read_index(prefix, key)
    except OSError as error:
        raise UserError(
            f"{key}: {error.filename or prefix} cannot be read ({error.strerror}); change its "
            "permissions, or give another prefix"
        ) from None


def _read_index(prefix: str, key: str) -> DatasetIndex:
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise UserError(
                f"{key}: {prefix}{suffix} is missing; give a prefix (no .bin or .idx) that "
                "`fp4pretrain data build` wrote"
            )
    with open(f"{prefix}.idx", "rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise UserError(
            f"{key}: {prefix}.idx is not a Megatron indexed dataset; "
            "build one with `fp4pretrain data build`"
        )
    _, version, code, sequences, marks = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{key}: {prefix}.idx has version {version}, token type {code}, where version 1 with "
            "integer tokens is read; build it again with `fp4pretrain data build`"
        )
    raw = np.memmap(f"{prefix}.idx", dtype=np.uint8, mode="r")
    lengths_end = _HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    if len(raw) < pointers_end + 8 * marks or sequences == 0:
        raise UserError(
            f"{key}: {prefix}.idx is cut short or empty; build or copy the dataset again"
        )
    dtype: np.dtype[Any] = np.dtype(_DTYPES[code])
    pointers = raw[lengths_end:pointers_end].view(np.int64)
    lengths = raw[_HEADER.size : lengths_end].view(np.int32)
    marked = raw[pointers_end : pointers_end + 8 * marks].view(np.int64)
    wrong = _damage(lengths, pointers, marked, itemsize=dtype.itemsize)
    if wrong is not None:
        raise UserError(
            f"{key}: {prefix}.idx is damaged ({wrong}); build or copy the dataset again"
        )
    expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    actual = Path(f"{prefix}.bin").stat().st_size
    if actual != expected or expected == 0:
        raise UserError(
            f"{key}: {prefix}.bin has {actual:,} bytes where its index says {expected:,}; "
            "build or copy the dataset again"
        )
    tokens, meta = expected // dtype.itemsize, _read_meta(prefix, key)
    check_sizes(prefix, meta, key=key)
    prompts = None
    if PROMPTS in meta.get(FILES, {}):
        prompts = np.memmap(f"{prefix}{PROMPTS}", dtype="<i4", mode="r")
        if len(prompts) != len(pointers):
            raise UserError(
                f"{key}: {prefix}{PROMPTS} has {len(prompts):,} prompts of {len(pointers):,} documents; "
                "build the dataset again"
            )
    return DatasetIndex(prefix, dtype, pointers, tokens, meta, prompts)


def _damage(
    lengths: NDArray[np.int32],
    pointers: NDArray[np.int64],
    marks: NDArray[np.int64],
    *,
    itemsize: int,
) -> str | None:
    """What is wrong with an index, None for nothing: documents end to end from byte 0 on, and marks
    (where Megatron's documents begin, counted in sequences) from 0 to the last, none going back."""
    expected = 0
    for begin in range(0, len(lengths), _MARKS):
        size = lengths[begin : begin + _MARKS].astype(np.int64) * itemsize
        if (size < 0).any():
            at = int(np.flatnonzero(size < 0)[0])
            return f"document {begin + at} has {size[at] // itemsize:,} tokens"
        ends = expected + np.cumsum(size)
        found = pointers[begin : begin + _MARKS]
        if (found != ends - size).any():
            return (
                f"document {begin + int(np.flatnonzero(found != ends - size)[0])} is out of place"
            )
        expected = int(ends[-1])
    if len(marks) == 0 or marks[0] != 0 or marks[-1] != len(lengths):
        return "its documents do not cover its sequences"
    for begin in range(0, len(marks), _MARKS):
        if (np.diff(marks[begin : begin + _MARKS + 1]) < 0).any():
            return "its documents go back"
    return None


def write_dataset(
    documents: Iterable[NDArray[np.int64]],
    prefix: str,
    *,
    tokenizer: Tokenizer,
    source: str,
    key: str = "out_prefix",
    prompts: Sequence[int] | None = None,
) -> DatasetIndex:
    """Write `documents` (ids without the end token, which is added here) to PREFIX.{bin,json,idx}.

    All files are made in a temporary folder beside PREFIX and renamed into place, the index
    last: whoever sees an index sees a whole dataset, and builders that race write equal files.
    ``prompts``: tokens of each document's prompt, to PREFIX.prompts; it may grow while documents are read.

    Raises:
        UserError: the folder cannot be written, or there is no document.
    """
    target = Path(prefix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(target.parent) as folder:
            made = str(Path(folder, target.name))
            largest = _write_tokens(documents, made, tokenizer=tokenizer)
            if largest < 0:
                raise UserError("inputs: no document in them; give files that hold text")
            meta = {
                "source": source,
                "tokenizer": tokenizer.place,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
                "largest_id": largest,
            }
            suffixes = [".bin", ".idx"]
            if prompts is not None:
                np.asarray(prompts, dtype="<i4").tofile(made + PROMPTS)
                suffixes.append(PROMPTS)
            meta[FILES] = described(made, suffixes)
            write_text(f"{made}.json", json.dumps(meta, indent=2) + "\n")
            if prompts is None:
                Path(prefix + PROMPTS).unlink(missing_ok=True)  # of a dataset that is replaced
            for suffix in (*suffixes[2:], ".bin", ".json", ".idx"):
                Path(made + suffix).replace(prefix + suffix)
    except OSError as error:
        raise unwritable(key, target.parent, error) from None
    return read_index(prefix, key=key)


def write_index(path: Path, lengths: NDArray[Any], *, dtype: np.dtype[Any]) -> None:
    """Write the .idx of documents that lie end to end in a .bin, one sequence each.

    Args:
        path: the .idx file.
        lengths: [documents], tokens of each.
        dtype: of the tokens in the .bin.
    """
    with open(path, "wb") as index:
        index.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1))
        index.write(lengths.astype("<i4", copy=False).tobytes())
        byte = 0
        for begin in range(0, len(lengths), _MARKS):
            size = lengths[begin : begin + _MARKS].astype(np.int64) * dtype.itemsize
            ends = byte + np.cumsum(size)
            index.write((ends - size).astype("<i8").tobytes())
            byte = int(ends[-1])
        for begin in range(0, len(lengths) + 1, _MARKS):
            marks = np.arange(begin, min(begin + _MARKS, len(lengths) + 1), dtype="<i8")
            index.write(marks.tobytes())


def _write_tokens(
    documents: Iterable[NDArray[np.int64]], made: str, *, tokenizer: Tokenizer
) -> int:
    """MADE.bin and MADE.idx; returns the largest id, -1 without documents.

    The bytes of megatron-core's IndexedDatasetBuilder, which keeps some 100 bytes a document in memory:
    here it is the 4 of its length.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < _UINT16_IDS else np.int32)
    lengths = array.array("i")
    largest = -1
    with open(f"{made}.bin", "wb") as tokens:
        for ids in documents:
            if len(ids) >= _LONGEST:
                raise UserError(
                    f"inputs: document {len(lengths)} has {len(ids):,} tokens, where {_LONGEST - 1:,} "
                    "are the most; divide it"
                )
            tokens.write(np.append(ids, tokenizer.eod).astype(dtype).tobytes())
            lengths.append(len(ids) + 1)
            largest = max(largest, tokenizer.eod, int(ids.max(initial=0)))
    sizes = np.frombuffer(lengths, dtype=np.int32) if lengths else np.zeros(0, np.int32)
    write_index(Path(f"{made}.idx"), sizes, dtype=dtype)
    return largest


@contextmanager
def folder_aside(parent: Path) -> Iterator[str]:
    """A temporary folder in ``parent`` to build in, removed afterwards. Folders that killed builders left
    are removed too.

    A folder counts as left behind when nothing was written to it for a day; another builder may be at work
    in a newer one.
    """
    for old in parent.glob(".building-*"):
        with suppress(FileNotFoundError):  # its builder finishes in this moment
            written = max(path.stat().st_mtime for path in (old, *old.rglob("*")))
            if time.time() - written > _DAY:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=parent) as folder:
        yield folder


def is_meta(file: Path) -> bool:
    """Whether PREFIX.json is one that `write_dataset` wrote, and not a file of the user's."""
    try:
        return "tokenizer_fingerprint" in _read_meta(str(file).removesuffix(".json"), "out")
    except UserError:
        return False


def _read_meta(prefix: str, key: str) -> dict[str, Any]:
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return {}
    meta = None
    if file.stat().st_size <= _META_BYTES:
        try:
            meta = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            meta = None
    if not isinstance(meta, dict):
        raise UserError(
            f"{key}: {file} is not what `fp4pretrain data build` writes beside a dataset; give your "
            "own file another name, or build the dataset again"
        )
    return meta
