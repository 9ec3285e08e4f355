"""The documents of one dataset, each with a hash of its content, read once and kept in the cache.

The hash decides which side of `data.split` a document is on. So it stays on its side when the corpus
grows, is shuffled or is copied, and two copies of one text never stand on both sides. The hashes of a
dataset in their order are its identity: a run records a digest of them, which no path or date enters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.data.indexed import (
    PROMPTS,
    DatasetIndex,
    folder_aside,
    read_index,
    unwritable,
)
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text

_FORMAT = 1  # raise it when the same documents come to have other hashes
_CHUNK_TOKENS = 1 << 22  # tokens a thread holds at once: 16 MiB
_HASHES, _ABOUT = "hashes.npy", "about.json"


@dataclass(frozen=True)
class Documents:
    """The documents of a dataset.

    Attributes:
        index: where they lie.
        hashes: [documents] uint64, of the token ids of each, whatever type they are stored in.
        digest: of all hashes in their order, and of the lengths of prompts: equal for equal datasets,
            wherever they lie.
        id_limit: the model's number of ids, which no token may reach; None where any is taken.
    """

    index: DatasetIndex
    hashes: NDArray[np.uint64]
    digest: str
    id_limit: int | None = None

    def between(self, low: float, high: float) -> NDArray[np.int64]:
        """Numbers of the documents, ascending, whose hash lies in [low, high) of its range 0 to 1."""
        at_least = self.hashes >= np.uint64(_edge(low)) if low > 0 else True
        below = self.hashes < np.uint64(_edge(high)) if high < 1 else True
        return np.flatnonzero(np.broadcast_to(at_least & below, self.hashes.shape))


def open_documents(prefix: str, *, cache: Path, key: str, build: bool) -> Documents:
    """The documents of the dataset PREFIX, hashed if `build` and the cache does not have them.

    Args:
        prefix: an indexed dataset.
        cache: the cache folder, shared by all ranks.
        key: the config key that names the dataset, for messages.
        build: whether this process may write to the cache; one that may not expects to find it.

    Raises:
        UserError: no such dataset, a cache that cannot be written or is not shared.
    """
    index = read_index(prefix, key=key)
    folder = cache / "documents" / _identity(prefix)
    if build and not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _write(index, folder)
        except OSError as error:
            raise unwritable("data.cache_dir", folder.parent, error) from None
    if not folder.is_dir():
        raise UserError(
            f"data.cache_dir: {folder} is not visible on every rank; set data.cache_dir to a "
            "folder that all nodes share"
        )
    hashes = np.load(folder / _HASHES, mmap_mode="r")
    return Documents(
        index, hashes, json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["digest"]
    )


def _edge(share: float) -> int:
    return min(int(share * 2.0**64), 2**64 - 1)


def _identity(prefix: str) -> str:
    """Changes whenever a file of the dataset is written anew."""
    facts: list[object] = [_FORMAT, os.path.realpath(prefix)]
    for suffix in (".idx", ".bin", PROMPTS):
        if suffix != PROMPTS or Path(prefix + suffix).exists():
            stat = Path(prefix + suffix).stat()
            facts += [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _write(index: DatasetIndex, folder: Path) -> None:
    """Hash every document, in threads (hashing lets go of Python's lock), into a temporary folder that is
    renamed: it is there whole or not at all, also where two runs start together."""
    with folder_aside(folder.parent) as made:
        target = Path(made, "documents")
        target.mkdir()
        hashes = np.empty(index.documents, dtype=np.uint64)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            chunks = list(_chunks(index))
            found = threads.map(lambda chunk: _hash(index, *chunk), chunks)
            for (begin, end), part in zip(chunks, found, strict=True):
                hashes[begin:end] = part
        np.save(target / _HASHES, hashes)
        state = hashlib.blake2b(hashes.astype("<u8").data, digest_size=16)
        if index.prompts is not None:
            state.update(index.prompts.astype("<i4").data)
        digest = state.hexdigest()
        write_text(target / _ABOUT, json.dumps({"digest": digest, "prefix": index.prefix}) + "\n")
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # not merely that another run was first
                raise


def _chunks(index: DatasetIndex) -> Iterator[tuple[int, int]]:
    """Consecutive documents [begin, end) of about _CHUNK_TOKENS together, one at least."""
    starts = index.pointers // index.dtype.itemsize
    begin = 0
    while begin < index.documents:
        end = int(np.searchsorted(starts, starts[begin] + _CHUNK_TOKENS, side="left"))
        end = min(max(end, begin + 1), index.documents)
        yield begin, end
        begin = end


def _hash(index: DatasetIndex, begin: int, end: int) -> NDArray[np.uint64]:
    first = index.offset(begin)
    tokens = index.read(first, index.offset(end)).astype("<i4")
    marks = [index.offset(document) - first for document in range(begin, end + 1)]
    data = tokens.data.cast("B")
    digests = b"".join(
        hashlib.blake2b(data[4 * low : 4 * high], digest_size=8).digest()
        for low, high in pairwise(marks)
    )
    return np.frombuffer(digests, dtype="<u8")
