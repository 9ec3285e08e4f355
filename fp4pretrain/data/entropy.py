"""The loss of a model that knows only how often each token occurs: the first mark for a run to get below.

A GPT starts near ln(vocabulary), soon learns the frequencies (this entropy), and everything below
it is context. The number costs one pass over the tokens and needs no model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.data.datasets import RandomTokens
from fp4pretrain.data.indexed import DatasetIndex
from fp4pretrain.data.validation import ValidationSet

_MAX_TOKENS = 1 << 26


def unigram_entropy(source: Any, *, max_tokens: int = _MAX_TOKENS) -> float:
    """Entropy of the token frequencies, in nats a token.

    Args:
        source: an array or tensor of ids, a DatasetIndex (all its documents), or a validation set
            of `build_datasets`.
        max_tokens: how many tokens to count, from its beginning.
    """
    shares = _frequencies(source, max_tokens)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _frequencies(source: Any, max_tokens: int) -> NDArray[np.float64]:
    """Share of each id, summing to 1."""
    if isinstance(source, RandomTokens):
        return np.full(source.vocab_size, 1 / source.vocab_size)
    if isinstance(source, ValidationSet):
        counts = np.zeros(0, dtype=np.int64)
        for number in range(min(len(source), -(-max_tokens // source.seq_length))):
            sample = source[number]
            ids = sample["labels"][sample["loss_mask"] > 0]
            found = np.bincount(ids.numpy(), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
    elif isinstance(source, DatasetIndex):
        counts = _counts(source.read(0, min(source.tokens, max_tokens)))
    else:
        counts = _counts(np.asarray(source).reshape(-1)[:max_tokens])
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def _counts(ids: NDArray[Any], *, minlength: int = 0) -> NDArray[np.int64]:
    """How often each id occurs; padding (-1) does not count."""
    return np.bincount(ids[ids >= 0], minlength=minlength)
