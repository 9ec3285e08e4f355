"""The worker processes of `fp4pretrain data corpus`: each reads, or encodes, one group of files.

A worker holds one group's text, a few MB, and uses one thread. What it made is renamed into place
when it is whole, so that a killed build continues with the groups it has:

    text-00007.bin, text-00007.npz    the documents' UTF-8 end to end; hashes, lengths, what is left out
    ids-00007.bin, ids-00007.npy      token ids end to end, each document ended; lengths
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.data.corpus_files import LeftOut, Piece, read_piece
from fp4pretrain.data.tokenizers import Tokenizer, load_tokenizer

_BATCH_BYTES = 1 << 20  # text encoded by one call


@dataclass(frozen=True)
class GroupText:
    """What `read_group` found.

    Attributes:
        hashes: [documents] uint64, of each document's UTF-8.
        lengths: [documents] int64, bytes.
        left_out: `LeftOut.reasons`.
    """

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    left_out: dict[str, list[int]]


def start_worker() -> None:
    """Set up a worker: one thread, and it ends when the build is interrupted or killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def read_group(folder: Path, number: int, pieces: list[Piece]) -> None:
    """Read and clean one group of files; equal documents in it are still all there."""
    left_out = LeftOut()
    documents: list[bytes] = []
    for piece in pieces:
        found, reason = read_piece(piece)
        if reason is not None:
            left_out.add(reason, files=int(piece.begin == 0), size=piece.size)
        documents += found
    _put(folder / f"text-{number:05}.bin", b"".join(documents))
    digests = (hashlib.blake2b(one, digest_size=8).digest() for one in documents)
    path = folder / f"text-{number:05}.npz"
    with open(_aside(path), "wb") as stream:
        np.savez(
            stream,
            hashes=np.frombuffer(b"".join(digests), dtype="<u8"),
            lengths=np.array([len(one) for one in documents], dtype=np.int64),
            left_out=np.array(json.dumps(left_out.reasons)),
        )
    _aside(path).replace(path)


def load_group(folder: Path, number: int) -> GroupText:
    """Load what `read_group` wrote."""
    with np.load(folder / f"text-{number:05}.npz") as facts:
        reasons = json.loads(str(facts["left_out"]))
        return GroupText(facts["hashes"], facts["lengths"], reasons)


def documents_of(folder: Path, number: int, keep: NDArray[np.bool_]) -> Iterator[bytes]:
    """The documents of a group that `keep` [documents] marks."""
    text = (folder / f"text-{number:05}.bin").read_bytes()
    ends = np.cumsum(load_group(folder, number).lengths)
    begins = np.concatenate([[0], ends[:-1]])
    for begin, end in zip(begins[keep].tolist(), ends[keep].tolist(), strict=True):
        yield text[begin:end]


def encode_group(
    folder: Path, number: int, keep: NDArray[np.bool_], tokenizer: Path, dtype: str
) -> None:
    """Encode the documents of a group that `keep` marks, an end token after each."""
    encoder = _tokenizer(str(tokenizer))
    parts: list[NDArray[Any]] = []
    lengths: list[int] = []
    end = np.array([encoder.eod], dtype)
    for batch in _batches(documents_of(folder, number, keep)):
        for ids in encoder.encode_batch(batch):
            parts += [ids.astype(dtype), end]
            lengths.append(len(ids) + 1)
    ids = np.concatenate(parts) if parts else np.empty(0, dtype)
    _put(folder / f"ids-{number:05}.bin", ids.tobytes())
    path = folder / f"ids-{number:05}.npy"
    largest = int(ids.max(initial=0))
    with open(_aside(path), "wb") as stream:
        np.save(stream, np.array([largest, *lengths], dtype=np.int64))
    _aside(path).replace(path)


def load_lengths(folder: Path, number: int) -> tuple[int, NDArray[np.int64]]:
    """The largest id of a group, and how many tokens each of its kept documents has."""
    facts = np.load(folder / f"ids-{number:05}.npy")
    return int(facts[0]), facts[1:]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _batches(documents: Iterator[bytes]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.decode())
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _put(path: Path, data: bytes) -> None:
    _aside(path).write_bytes(data)
    _aside(path).replace(path)
