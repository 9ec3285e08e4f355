"""In which order a run reads its training documents: a function of (data.seed, epoch) alone.

In every epoch the documents are shuffled, laid end to end and cut into samples, and the samples are
shuffled. A longer run therefore reads what a shorter one read, and then goes on. (megatron-core's
GPTDataset shuffles all epochs of a run together, so that another train.steps is another order.)

An epoch takes three arrays: documents, where each ends, samples. Small ones are made in memory, by
every rank, in milliseconds; large ones by one process into the cache, from where all ranks map them.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fp4pretrain.data.documents import Documents
from fp4pretrain.data.indexed import folder_aside, unwritable
from fp4pretrain.data.stream import Ends, Sample, TokenStream
from fp4pretrain.errors import LocalError, UserError

_FORMAT = 1  # raise it when the same seed comes to give another order
_IN_MEMORY = 1 << 20  # documents and samples of an epoch whose arrays are not worth a file
_SEED_WORD = 2**32  # numpy's legacy generator, whose streams never change, takes 32-bit words


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents. ``samples``: the stretch of the stream that comes n-th."""

    stream: TokenStream
    samples: NDArray[Any]


class TrainingSamples(torch.utils.data.Dataset[Sample]):
    """Endless: sample n is in epoch n // `epoch_samples`, each epoch in an order of its own.

    Tokens at an epoch's end that do not fill a sample are left out. They are other tokens in each epoch.

    Args:
        documents: the dataset.
        numbers: its documents that are trained on.
        seq_length: tokens a sample.
        seed: 0 to 2^32 - 1, with `member` (the dataset's place in a blend) and the epoch it decides
            the order.
        cache: the cache folder.
        meaning: what ends of documents mean; None: nothing.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        numbers: NDArray[np.int64],
        seq_length: int,
        seed: int,
        member: int,
        cache: Path,
        meaning: Ends | None = None,
    ) -> None:
        self._documents = documents
        self._meaning = meaning
        self._numbers = numbers
        self._seed = [seed % _SEED_WORD, member]
        self.seq_length = seq_length
        self.tokens = int(documents.index.lengths()[self._numbers].sum())
        self.epoch_samples = (self.tokens - 1) // seq_length
        chosen = hashlib.blake2b(numbers.astype("<i8").data, digest_size=16).hexdigest()
        facts = [_FORMAT, documents.digest, chosen, seq_length, self._seed]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        self._folder = cache / "indices" / self.digest
        self._open: dict[int, Epoch] = {}

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, self.epoch_samples)
        opened = self.epoch(epoch)
        begin = int(opened.samples[place]) * self.seq_length
        return opened.stream.sample(begin, self.seq_length)

    def epoch(self, number: int) -> Epoch:
        """The arrays of an epoch: those in memory, the cache's, or made now."""
        if number not in self._open:
            # where an epoch begins, the samples of a batch are in two of them
            self._open = {n: e for n, e in self._open.items() if n == number - 1}
            self._open[number] = self._load(number)
        return self._open[number]

    def prepare(self, number: int) -> bool:
        """Write the arrays of an epoch into the cache if they belong there; False if they do not."""
        if len(self._numbers) + self.epoch_samples <= _IN_MEMORY:
            return False
        folder = self._cached(number)
        if not folder.is_dir():
            self._write(number, folder)
        return True

    def _cached(self, number: int) -> Path:
        return self._folder / f"epoch_{number:06d}"

    def _load(self, number: int) -> Epoch:
        if self.prepare(number):
            order, ends, samples = (
                np.load(self._cached(number) / f"{name}.npy", mmap_mode="r")
                for name in ("documents", "ends", "samples")
            )
        else:
            order, ends, samples = self._made(number)
        return Epoch(
            TokenStream(
                self._documents.index,
                order,
                ends=ends,
                id_limit=self._documents.id_limit,
                meaning=self._meaning,
            ),
            samples,
        )

    def _made(self, epoch: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any]]:
        random = np.random.RandomState([*self._seed, epoch % _SEED_WORD])
        order = random.permutation(self._numbers)
        ends = np.cumsum(self._documents.index.lengths()[order])
        small = self.epoch_samples < 2**31
        samples = random.permutation(self.epoch_samples).astype(np.int32 if small else np.int64)
        return order, ends, samples

    def _write(self, number: int, folder: Path) -> None:
        """Write into a temporary folder and rename it, so that the folder is whole or absent even where
        several processes write it."""
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with folder_aside(folder.parent) as made:
                target = Path(made, "epoch")
                target.mkdir()
                arrays = zip(("documents", "ends", "samples"), self._made(number), strict=True)
                for name, array in arrays:
                    np.save(target / f"{name}.npy", array)
                try:
                    target.rename(folder)
                except OSError:
                    if not folder.is_dir():  # not merely that another run was first
                        raise
        except OSError as error:
            raise unwritable("data.cache_dir", folder.parent, error) from None


class Blend(torch.utils.data.Dataset[Sample]):
    """Samples of several datasets, interleaved so that each keeps its share throughout. Endless, unless
    every dataset has a cap.

    Sample n is decided by the weights and by the samples before it (megatron-core's rule), so a
    longer run begins like a shorter one. From where a dataset reaches its cap the rule begins anew with
    the others.

    Args:
        members: the datasets.
        weights: their shares, summing to 1.
        expected: how many samples will be asked for; more are planned when they are.
        caps: how many samples of each may be read; None for any number.

    Raises:
        UserError: more samples are expected than the caps allow.
    """

    def __init__(
        self,
        members: list[TrainingSamples],
        weights: list[float],
        *,
        expected: int,
        caps: list[int | None] | None = None,
    ) -> None:
        self.members = members
        self.weights = weights
        self._caps = [math.inf if cap is None else cap for cap in caps or [None] * len(members)]
        self._refuse(expected - 1, UserError)
        self._plan(min(max(1, expected), sum(self._caps)))

    def __getitem__(self, number: int) -> Sample:
        while number >= len(self._member):
            # a run that passed over batches reads further than planned
            self._refuse(number, LocalError)
            self._plan(min(2 * len(self._member), sum(self._caps)))
        return self.members[int(self._member[number])][int(self._sample[number])]

    def _refuse(self, number: int, kind: type[UserError]) -> None:
        """Raises an error for a sample that the caps leave no room for."""
        if number >= sum(self._caps):
            raise kind(
                f"data.path: the run reads {number + 1:,} samples where the caps of its datasets "
                f"(max_epochs, max_tokens) allow {sum(self._caps):,}; raise one, or shorten train.steps"
            )

    def _plan(self, samples: float) -> None:
        """``_member`` and ``_sample`` [samples]: which dataset, and which of its samples, comes n-th."""
        total = int(samples)
        self._member = np.zeros(total, dtype=np.int16)
        self._sample = np.zeros(total, dtype=np.int64)
        read = [0] * len(self.members)
        begin = 0
        while begin < total:
            open_ = [i for i, cap in enumerate(self._caps) if read[i] < cap]
            member, sample = _interleaved([self.weights[i] for i in open_], total - begin)
            # up to where the first of them would go over its cap
            over = [
                np.flatnonzero((member == place) & (sample >= self._caps[i] - read[i]))[:1]
                for place, i in enumerate(open_)
            ]
            count = int(min((found[0] for found in over if len(found)), default=total - begin))
            part = slice(begin, begin + count)
            for place, i in enumerate(open_):
                mine = member[:count] == place
                self._member[part][mine] = i
                self._sample[part][mine] = sample[:count][mine] + read[i]
                read[i] += int(mine.sum())
            begin += count


def _interleaved(weights: list[float], samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """megatron-core's blend of datasets with these weights: which one, and which of its samples."""
    member, sample = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    if len(weights) == 1:
        return member, np.arange(samples, dtype=np.int64)
    from megatron.core.datasets import helpers_cpp

    shares = np.array(weights, dtype=np.float64)
    if abs(shares.sum() - 1) > 1e-12:  # given ones are left as they are, to the last bit
        shares /= shares.sum()
    helpers_cpp.build_blending_indices(member, sample, shares, len(weights), samples, False)
    return member, sample
