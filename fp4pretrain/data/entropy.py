"""The loss of a model that knows only how often each token occurs: the first line to get under.

A GPT starts near ln(vocabulary), soon learns the frequencies (this entropy), and everything below
it is context. The number costs one pass over the tokens and needs no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fp4pretrain.data.datasets import RandomTokens
from fp4pretrain.data.indexed import DatasetIndex

_MAX_TOKENS = 1 << 26


def unigram_entropy(source: Any, *, max_tokens: int = _MAX_TOKENS) -> float:
    """Entropy of the token frequencies, in nats a token.

    Args:
        source: an array or tensor of ids, a DatasetIndex (all its documents), or a dataset of
            `build_datasets` (the documents of its split; a blend weighs its members).
        max_tokens: how many tokens of each dataset to count, from its beginning.
    """
    shares = _frequencies(source, max_tokens)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _frequencies(source: Any, max_tokens: int) -> NDArray[np.float64]:
    """Share of each id, summing to 1."""
    if isinstance(source, RandomTokens):
        return np.full(source.vocab_size, 1 / source.vocab_size)
    if hasattr(source, "datasets"):  # BlendedDataset
        members = [_frequencies(member, max_tokens) for member in source.datasets]
        blend = np.zeros(max(map(len, members)))
        for weight, shares in zip(source.weights, members, strict=True):
            blend[: len(shares)] += weight * shares
        return blend
    if isinstance(source, torch.utils.data.Dataset):  # GPTDataset: of its documents, not samples
        counts = np.zeros(0, dtype=np.int64)
        for document in source.indices:  # type: ignore[attr-defined]
            ids = source.dataset[int(document)]  # type: ignore[attr-defined]
            found = _counts(ids, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            if counts.sum() >= max_tokens:
                break
    elif isinstance(source, DatasetIndex):
        counts = _counts(source.read(0, min(source.tokens, max_tokens)))
    else:
        counts = _counts(np.asarray(source).reshape(-1)[:max_tokens])
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def _counts(ids: NDArray[Any], *, minlength: int = 0) -> NDArray[np.int64]:
    """How often each id occurs; padding (-1) does not count."""
    return np.bincount(ids[ids >= 0], minlength=minlength)
