"""A DataSpec made into what a run reads: training samples without end, and named validation sets.

One process hashes the documents of each dataset into the cache, once; the others wait and map the same
files. What is cached lies in folders that are named by all that decides their content, written under
another name and renamed:
a dataset that is built anew under its old name meets no old files, and of runs that start together
none reads another's half-written ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fp4pretrain.data.build import stdlib_corpus
from fp4pretrain.data.documents import Documents, open_documents
from fp4pretrain.data.ids import padding_line
from fp4pretrain.data.order import Blend, TrainingSamples
from fp4pretrain.data.spec import (
    DataSpec,
    Part,
    check_dataset,
    parse_split,
    parts_of,
    valid_parts_of,
    validate,
)
from fp4pretrain.data.stream import Ends, Sample, sample_of
from fp4pretrain.data.tokenizers import Tokenizer, load_tokenizer
from fp4pretrain.data.validation import HeldOut, ValidationSet
from fp4pretrain.errors import UserError

# The name of the validation set of a run that names none.
HELD_OUT = "validation"

_VALIDATION_SEED = 0  # of mock tokens: every run's validation set is the same


class RandomTokens(torch.utils.data.Dataset[Sample]):
    """Uniform random tokens, for benchmarks: no files, and sample i is a function of (seed, i).

    Samples are those of text: tokens, labels, position_ids int64 [seq], loss_mask fp32 [seq].
    ``samples``: how many there are; None is no end. ``meaning``: of ends of documents, None for nothing.
    """

    def __init__(
        self,
        samples: int | None,
        *,
        seq_length: int,
        vocab_size: int,
        seed: int,
        stream: int,
        meaning: Ends | None = None,
    ) -> None:
        self.samples = samples
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self._meaning = meaning
        self._key = [seed % 2**64, stream]
        facts: list[object] = ["random tokens", samples, seq_length, vocab_size, *self._key]
        if meaning is not None and meaning.no_loss:
            facts.append(["no loss behind", meaning.eod])
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("random tokens for training have no end")
        return self.samples

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        if self._meaning is not None and self._meaning.no_loss:
            return sum(int(self[i]["loss_mask"].sum()) for i in range(len(self)))
        return len(self) * self.seq_length

    def __getitem__(self, index: int) -> Sample:
        # Drawing moves the counter's lowest word, so the sample's number stands in the highest.
        bits = np.random.Philox(key=self._key, counter=[0, 0, 0, index])
        ids = np.random.Generator(bits).integers(self.vocab_size, size=self.seq_length + 1)
        return sample_of(ids, self.seq_length, meaning=self._meaning)


Training: TypeAlias = TrainingSamples | Blend | RandomTokens
Validation: TypeAlias = ValidationSet | RandomTokens


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    ``train`` has no end: sample n is the n-th that the run reads. ``valid``: the validation sets by
    name, the main one first. ``digest``: of the training text and its order.
    """

    train: Training
    valid: Mapping[str, Validation]
    digest: str


def build_datasets(
    spec: DataSpec,
    *,
    samples: int,
    is_builder: bool,
    agree: Callable[[UserError | None], None],
) -> RunData:
    """Training samples and validation sets. Call it on every rank; torch.distributed is not used.

    Args:
        spec: the run's data.
        samples: how many training samples the run is going to read: their order is prepared here,
            that of more when they are read.
        is_builder: true on exactly one process: global rank 0.
        agree: called twice on every rank, with the rank's own error or None. It waits for all
            ranks, and raises on all where any has an error.

    Raises:
        UserError: as `validate`, and for a split that leaves too little text or a cache folder that
            not all ranks share.
    """
    found: list[RunData] = []

    def attempt(build: bool) -> UserError | None:
        try:
            found.append(_build(spec, samples=samples, build=build))
        except UserError as error:
            return error
        return None

    agree(attempt(True) if is_builder else None)
    agree(None if is_builder else attempt(False))
    return found[0]


def _build(spec: DataSpec, *, samples: int, build: bool) -> RunData:
    validate(spec)
    tokenizer = load_tokenizer(spec.tokenizer)
    if spec.mock:
        return _mock(spec, tokenizer)
    parts = parts_of(spec)
    if not parts:
        prefix = stdlib_corpus(spec.cache, tokenizer, build=build)
        parts = [Part("data.path", prefix, 1.0)]
    opened = [_open(spec, part, tokenizer=tokenizer, build=build) for part in parts]
    members = [
        _training(spec, part, documents, member=number, meaning=_meaning(spec, tokenizer))
        for number, (part, documents) in enumerate(zip(parts, opened, strict=True))
    ]
    parts = _weighed(parts, members)
    weights = [part.weight or 0.0 for part in parts]
    caps = [_cap(part, member) for part, member in zip(parts, members, strict=True)]
    if build:
        for member, weight, cap in zip(members, weights, caps, strict=True):
            share = round(samples * weight)
            _prepare(member, samples=share if cap is None else min(share, cap))
    train: TrainingSamples | Blend = members[0]
    facts: list[object] = [[member.digest for member in members], weights, tokenizer.fingerprint]
    if len(members) > 1 or caps != [None]:
        train = Blend(members, weights, expected=samples, caps=caps)
    if any(cap is not None for cap in caps):
        facts.append(caps)
    return RunData(
        train=train,
        valid=_validation(spec, parts, opened, tokenizer=tokenizer, build=build),
        digest=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24],
    )


def _mock(spec: DataSpec, tokenizer: Tokenizer) -> RunData:
    vocab_size = spec.vocab_size if spec.vocab_size is not None else tokenizer.vocab_size
    held_out = -(-(spec.valid_tokens or spec.seq_length) // spec.seq_length)
    train, valid = (
        RandomTokens(
            count,
            seq_length=spec.seq_length,
            vocab_size=vocab_size,
            seed=seed,
            stream=stream,
            meaning=_meaning(spec, tokenizer),
        )
        for stream, (count, seed) in enumerate([(None, spec.seed), (held_out, _VALIDATION_SEED)])
    )
    return RunData(train, {HELD_OUT: valid}, train.digest)


def _open(spec: DataSpec, part: Part, *, tokenizer: Tokenizer, build: bool) -> Documents:
    documents = open_documents(part.prefix, cache=spec.cache, key=part.key, build=build)
    check_dataset(spec, documents.index, key=part.key, tokenizer=tokenizer)
    if build and (line := padding_line(documents.index)):
        print(f"warning: {part.key}: {line}", flush=True)
    limit = spec.vocab_size if spec.vocab_size is not None else tokenizer.vocab_size
    return replace(documents, id_limit=limit)


def _meaning(spec: DataSpec, tokenizer: Tokenizer) -> Ends | None:
    """What ends of documents mean to a run; None where they are tokens like others."""
    if not (spec.document_mask or spec.reset_positions or spec.eod_mask_loss):
        return None
    return Ends(
        tokenizer.eod,
        mask=spec.document_mask,
        reset=spec.reset_positions,
        no_loss=spec.eod_mask_loss,
    )


def _training(
    spec: DataSpec, part: Part, documents: Documents, *, member: int, meaning: Ends | None
) -> TrainingSamples:
    """The documents below the validation share, and the validation share too where other text
    validates. Raises UserError where they are too few."""
    train, valid, _ = parse_split(spec.split)
    high = train + (valid if spec.valid is not None else 0.0)
    numbers = documents.between(0.0, high)
    if spec.valid is None:
        numbers = np.setdiff1d(numbers, _held_out(spec, part, documents), assume_unique=True)
    tokens = int(documents.index.lengths()[numbers].sum())
    if tokens < spec.seq_length + 1:
        raise UserError(
            f"{part.key}: {tokens:,} training tokens in {part.prefix} are too few for one sample "
            f"of {spec.seq_length:,} + 1; give more text, another data.split, or a shorter "
            "model.seq_length"
        )
    return TrainingSamples(
        documents,
        numbers=numbers,
        seq_length=spec.seq_length,
        seed=spec.seed,
        member=member,
        cache=spec.cache,
        meaning=meaning,
    )


def _weighed(parts: Sequence[Part], members: Sequence[TrainingSamples]) -> list[Part]:
    """Parts with their shares: as given, or in proportion to epochs times samples of an epoch."""
    if any(part.epochs is None for part in parts):
        return list(parts)
    sizes = [
        (part.epochs or 0.0) * member.epoch_samples
        for part, member in zip(parts, members, strict=True)
    ]
    return [
        replace(part, weight=size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)
    ]


def _cap(part: Part, member: TrainingSamples) -> int | None:
    """How many samples of a part a run may read; None for any number."""
    caps = []
    if part.max_epochs is not None:
        caps.append(math.floor(part.max_epochs * member.epoch_samples))
    if part.max_tokens is not None:
        caps.append(part.max_tokens // member.seq_length)
    if caps and min(caps) == 0:
        raise UserError(
            f"{part.key}: its cap is below one sample of {member.seq_length:,} tokens; raise max_epochs or "
            "max_tokens, or leave the dataset out"
        )
    return min(caps, default=None)


def _prepare(member: TrainingSamples, *, samples: int) -> None:
    for epoch in range(-(-samples // member.epoch_samples)):
        if not member.prepare(epoch):
            return


def _held_out(spec: DataSpec, part: Part, documents: Documents) -> NDArray[np.int64]:
    """The documents of the validation share. A small dataset may have none by chance: then the document
    with the next hash is taken.

    Raises UserError where there are two tokens at most.
    """
    train, valid, _ = parse_split(spec.split)
    numbers = documents.between(train, train + valid)
    if not len(numbers):
        below = documents.between(0.0, train)
        numbers = below[np.argsort(documents.hashes[below])[-1:]]
    if documents.index.lengths()[numbers].sum() < 2:
        raise UserError(
            f"data.split: '{spec.split}' leaves no validation text of {part.prefix}; raise that "
            "share, give more documents, or name another dataset as data.valid"
        )
    return numbers


def _validation(
    spec: DataSpec,
    parts: Sequence[Part],
    opened: Sequence[Documents],
    *,
    tokenizer: Tokenizer,
    build: bool,
) -> dict[str, ValidationSet]:
    """data.valid's datasets, whole, or the held-out documents of the training ones."""
    sets: dict[str, list[HeldOut]] = {}
    for name, part in valid_parts_of(spec).items():
        documents = _open(spec, part, tokenizer=tokenizer, build=build)
        if documents.index.tokens < 2:
            raise UserError(f"{part.key}: {part.prefix} has no two tokens; give more text")
        sets[name] = [HeldOut(documents, np.arange(documents.index.documents))]
    if not sets:
        sets[HELD_OUT] = [
            HeldOut(documents, _held_out(spec, part, documents), part.weight or 1.0)
            for part, documents in zip(parts, opened, strict=True)
        ]
    found = {
        name: ValidationSet(
            held_out,
            seq_length=spec.seq_length,
            tokens=spec.valid_tokens,
            meaning=_meaning(spec, tokenizer),
        )
        for name, held_out in sets.items()
    }
    for name, one in found.items():
        if not one.tokens:
            cure = ", or leave out data.eod_mask_loss" if spec.eod_mask_loss else ""
            raise UserError(
                f"data.valid: no token of {name!r} is in the loss; give text that has some{cure}"
            )
    return found
