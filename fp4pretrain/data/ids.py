"""Which token ids a dataset holds, and which a model can take.

megatron-core reads id -1 as padding: such a token is fed as id 0 and left out of the loss. Other ids
below 0 (-100, a PyTorch habit; ids above 32767 written as int16) and ids from the vocabulary's size on
would fail deep inside numpy or the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.data.indexed import DatasetIndex
from fp4pretrain.errors import LocalError, UserError

PADDING = -1
_SCAN_TOKENS = 1 << 24  # 32 MB of uint16: a fraction of a second
_WINDOWS = 64


@dataclass(frozen=True)
class Ids:
    """What a scan found: the extreme ids, and how many of the ``scanned`` tokens are padding."""

    smallest: int
    largest: int
    padding: int
    scanned: int


def scan(index: DatasetIndex) -> Ids:
    """The ids of all tokens up to 16 Mi of them, of 64 even samples beyond.

    A dataset that `data build` wrote is not read: its PREFIX.json holds the largest id.
    """
    if "largest_id" in index.meta:
        return Ids(0, int(index.meta["largest_id"]), 0, index.tokens)
    parts = [index.read(begin, end) for begin, end in _windows(index.tokens)]
    return Ids(
        min(int(part.min()) for part in parts),
        max(int(part.max()) for part in parts),
        sum(int((part == PADDING).sum()) for part in parts if part.dtype.kind == "i"),
        sum(len(part) for part in parts),
    )


def check_ids(index: DatasetIndex, *, vocab_size: int | None, key: str) -> None:
    """Whether a model of `vocab_size` (None: any) can take what `scan` reads of a dataset.

    Raises:
        UserError: naming the document and the id.
    """
    found = scan(index)
    limit = vocab_size if vocab_size is not None else found.largest + 1
    if found.smallest >= PADDING and found.largest < limit:
        return
    place = "" if "largest_id" in index.meta else f"document {_document(index, limit)} of "
    if found.smallest < PADDING:
        raise UserError(f"{key}: {_below(index, found.smallest, place)}")
    raise UserError(
        f"model.vocab_size: {vocab_size} leaves out token id {found.largest} of {place}"
        f"{index.prefix}; set model.vocab_size={found.largest + 1} or more"
    )


def refuse_sample(ids: NDArray[Any], *, document: int, prefix: str, vocab_size: int) -> None:
    """Raises LocalError for the first id of a document that training cannot take, if there is one."""
    wrong = ids[(ids < PADDING) | (ids >= vocab_size)]
    if len(wrong):
        raise LocalError(
            f"data.path: document {document} of {prefix} holds token id {int(wrong[0])}, where this "
            f"model takes 0 to {vocab_size - 1} (and -1 for padding); build the dataset again"
        )


def has_id(index: DatasetIndex, wanted: int) -> bool:
    """Whether one of the first 16 Mi tokens has this id. For the id that ends a document PREFIX.json answers
    without reading tokens."""
    if index.meta.get("eod") == wanted:
        return True
    return bool((index.read(0, min(index.tokens, _SCAN_TOKENS)) == wanted).any())


def padding_line(index: DatasetIndex) -> str | None:
    """What to say of a dataset's padding; None where the tokens that were read have none."""
    found = scan(index)
    if not found.padding:
        return None
    return (
        f"{found.padding:,} of {found.scanned:,} tokens read of {index.prefix} are padding (id -1): "
        "left out of the loss"
    )


def _windows(tokens: int) -> list[tuple[int, int]]:
    if tokens <= _SCAN_TOKENS:
        return [(0, tokens)]
    length = _SCAN_TOKENS // _WINDOWS
    begins = np.linspace(0, tokens - length, _WINDOWS).astype(np.int64).tolist()
    return [(begin, begin + length) for begin in begins]


def _document(index: DatasetIndex, limit: int) -> int:
    """The first document in which `scan` reads an id below -1, or from `limit` on."""
    for begin, end in _windows(index.tokens):
        ids = index.read(begin, end)
        wrong = np.flatnonzero((ids.astype(np.int64) < PADDING) | (ids >= limit))
        if len(wrong):
            byte = (begin + int(wrong[0])) * index.dtype.itemsize
            return int(np.searchsorted(index.pointers, byte, side="right")) - 1
    raise AssertionError("the scan found a wrong id")


def _below(index: DatasetIndex, smallest: int, place: str) -> str:
    why = "only -1, padding, may be below 0"
    if index.dtype == np.int16:
        why += " (ids above 32767 do not fit its int16)"
    return f"{place}{index.prefix} holds ids down to {smallest}; {why}; build the dataset again"
