"""Held-out text: for one dataset the same sequences in the same order, whatever the run.

Neither seed nor length, batch size nor layout enters. The documents lie in the order of their hashes,
which is random and nobody's choice, and are cut into sequences of seq_length; where there are more
tokens than `data.valid_tokens`, evenly spaced sequences stand for all. The last sequence may be
shorter: the rest of it is masked, so that every token counts once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fp4pretrain.data.documents import Documents
from fp4pretrain.data.stream import Ends, Sample, TokenStream


@dataclass(frozen=True)
class HeldOut:
    """The held-out documents of one dataset: ``numbers``, and its ``weight`` among several."""

    documents: Documents
    numbers: NDArray[np.int64]
    weight: float = 1.0


class ValidationSet(torch.utils.data.Dataset[Sample]):
    """`held_out` documents, of a blend in proportion to its weights.

    Attributes:
        digest: of the documents' contents, of the sequences chosen and of what is predicted of them:
            equal for equal sets.
        tokens: how many are predicted.
    """

    def __init__(
        self,
        held_out: Sequence[HeldOut],
        *,
        seq_length: int,
        tokens: int | None,
        meaning: Ends | None = None,
    ) -> None:
        self.seq_length = seq_length
        self._streams = []
        facts: list[object] = [seq_length]
        for part in held_out:
            hashes = part.documents.hashes[part.numbers]
            by_hash = np.argsort(hashes, kind="stable")
            ordered = hashes[by_hash].astype("<u8")
            facts.append(hashlib.blake2b(ordered.data, digest_size=16).hexdigest())
            self._streams.append(
                TokenStream(
                    part.documents.index,
                    part.numbers[by_hash],
                    id_limit=part.documents.id_limit,
                    meaning=meaning,
                )
            )
        counts = [-(-(len(stream) - 1) // seq_length) for stream in self._streams]
        wanted = [part.weight for part in held_out]
        self._chosen = [
            np.arange(share) * count // share
            for share, count in zip(
                _shares(counts, wanted, tokens, seq_length), counts, strict=True
            )
        ]
        facts += [[len(chosen), count] for chosen, count in zip(self._chosen, counts, strict=True)]
        self._begins = np.cumsum([0, *map(len, self._chosen)])
        self.tokens = sum(self._predicted(i) for i in range(len(self._streams)))
        silent: list[object] = []
        if meaning is not None and meaning.no_loss:
            silent.append(["no loss behind", meaning.eod])
        for stream in self._streams:
            if stream.index.prompts is not None:
                lengths = stream.index.prompts[stream.order].astype("<i4")
                digest = hashlib.blake2b(lengths.data, digest_size=16).hexdigest()
                silent.append(["prompts", digest])
        if silent:
            self.tokens = sum(int(self[i]["loss_mask"].sum()) for i in range(len(self)))
            facts += silent
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self._begins, number, side="right")) - 1
        begin = int(self._chosen[part][number - self._begins[part]]) * self.seq_length
        return self._streams[part].sample(begin, self.seq_length)

    def _predicted(self, part: int) -> int:
        """Tokens of one stream's sequences; the stream's last one is short."""
        chosen, stream = self._chosen[part], self._streams[part]
        begins = chosen * self.seq_length
        return int(np.minimum(self.seq_length, len(stream) - 1 - begins).sum())


def _shares(
    counts: Sequence[int], weights: Sequence[float], tokens: int | None, seq_length: int
) -> list[int]:
    """How many sequences of each stream: in proportion to the weights, as many as there are of the
    scarcest and at most `tokens` together, one of each at least."""
    total = min(count / weight for count, weight in zip(counts, weights, strict=True))
    if tokens is not None:
        total = min(total, -(-tokens // seq_length))
    shares = [round(total * weight) for weight in weights]
    return [min(max(share, 1), count) for share, count in zip(shares, counts, strict=True)]
