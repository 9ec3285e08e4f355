"""A DataSpec made into megatron-core datasets: GPTDataset, and BlendedDataset over several.

GPTDataset needs three indices a split: the shuffled documents, where each sample begins in them,
and the shuffled samples. They are built by one rank and mapped from disk by all. megatron-core
names its cache files by the dataset's PATH and writes them in place; so a dataset rebuilt under the
same name would meet old indices, and two runs of a sweep could read each other's half-written ones.
Here the indices of a run live in one folder, named by everything they depend on, made aside and
renamed: it is either absent or whole.

The order of samples is a function of (datasets, tokenizer, split, seq_length, seed, samples). As in
Megatron-LM it does depend on the number of samples asked for, because several epochs are shuffled
together: resume a run with the train.steps it was begun with.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from fp4pretrain.data.build import stdlib_corpus
from fp4pretrain.data.ids import padding_line
from fp4pretrain.data.indexed import folder_aside, read_index
from fp4pretrain.data.spec import (
    DataSpec,
    Part,
    Samples,
    check_dataset,
    parse_split,
    parts_of,
    split_documents,
    validate,
)
from fp4pretrain.data.tokenizers import Tokenizer, load_tokenizer
from fp4pretrain.errors import UserError
from fp4pretrain.files import unwritable

if TYPE_CHECKING:
    from fp4pretrain.data.gpt import GPTDatasetConfig

Sample: TypeAlias = dict[str, Any]
Dataset: TypeAlias = torch.utils.data.Dataset[Sample]

# A member of a blend is built a little longer than its share, since the interleaving may run ahead
# of a weight by a sample or two (megatron-core's mid_level_dataset_surplus).
_SURPLUS = 1.005


class RandomTokens(torch.utils.data.Dataset[Sample]):
    """Uniform random tokens, for benchmarks: no files, and sample i is a function of (seed, i).

    Samples are those of a GPTDataset: tokens, labels, position_ids int64 [seq], loss_mask fp32
    [seq].
    """

    def __init__(
        self, samples: int, *, seq_length: int, vocab_size: int, seed: int, stream: int
    ) -> None:
        self.samples = samples
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self._key = [seed % 2**64, stream]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        # Drawing moves the counter's lowest word, so the sample's number stands in the highest.
        bits = np.random.Philox(key=self._key, counter=[0, 0, 0, index])
        ids = np.random.Generator(bits).integers(self.vocab_size, size=self.seq_length + 1)
        text = torch.from_numpy(ids)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


def build_datasets(
    spec: DataSpec,
    *,
    samples: Samples,
    is_builder: bool,
    barrier: Callable[[], None],
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Training, validation and test datasets; None where no sample is asked for.

    Call it on every rank. One process builds what is not in the cache; the others wait at `barrier`
    and map the same files. torch.distributed may be initialized or not; it is not used.

    Args:
        spec: the run's data.
        samples: how many samples of seq_length tokens each split must serve at least, epochs
            repeating as needed.
        is_builder: true on exactly one process: global rank 0.
        barrier: returns when every rank has called it. Called twice, unless `spec.mock`.

    Raises:
        UserError: as `validate`, or a cache folder that not all ranks share.
    """
    validate(spec, samples=samples)
    tokenizer = load_tokenizer(spec.tokenizer)
    if spec.mock:
        train, valid, test = _mock(spec, tokenizer, samples)
        return train, valid, test
    parts = parts_of(spec)
    if not parts and is_builder:
        stdlib_corpus(spec.cache, tokenizer, build=True)
    barrier()
    if not parts:
        prefix = stdlib_corpus(spec.cache, tokenizer, build=False)
        parts = [Part("data.path", prefix, 1.0)]
        check_dataset(
            spec, read_index(prefix), key="data.path", tokenizer=tokenizer, samples=samples
        )
    folder = _index_folder(spec, parts, tokenizer=tokenizer, samples=samples)
    config = _gpt_config(spec, parts, tokenizer=tokenizer)
    members = [_Member.of(part, spec.split) for part in parts]
    if is_builder:
        for part in parts:
            if line := padding_line(read_index(part.prefix, key=part.key)):
                print(f"warning: {part.key}: {line}", flush=True)
    if is_builder and not folder.is_dir():
        _build_indices(members, config, samples=samples, folder=folder)
    barrier()
    if not folder.is_dir():
        raise UserError(
            f"data.cache_dir: {folder} is not visible on every rank; set data.cache_dir to a "
            "folder that all nodes share"
        )
    config.path_to_cache = str(folder)
    train, valid, test = _open(members, config, samples=samples)
    return train, valid, test


@dataclass(frozen=True)
class _Member:
    """One dataset of a blend, with the documents of its three splits."""

    prefix: str
    weight: float
    splits: tuple[range, ...]

    @classmethod
    def of(cls, part: Part, split: str) -> _Member:
        documents = read_index(part.prefix, key=part.key).documents
        return cls(part.prefix, part.weight, tuple(split_documents(split, documents)))


def _mock(spec: DataSpec, tokenizer: Tokenizer, samples: Samples) -> list[Dataset | None]:
    vocab_size = spec.vocab_size if spec.vocab_size is not None else tokenizer.vocab_size
    datasets: list[Dataset | None] = [
        RandomTokens(
            count, seq_length=spec.seq_length, vocab_size=vocab_size, seed=spec.seed, stream=stream
        )
        for stream, count in enumerate(samples)
    ]
    return [dataset if count else None for dataset, count in zip(datasets, samples, strict=True)]


def _gpt_config(spec: DataSpec, parts: list[Part], *, tokenizer: Tokenizer) -> GPTDatasetConfig:
    from fp4pretrain.data.gpt import GPTDatasetConfig  # takes seconds to import

    return GPTDatasetConfig(
        random_seed=spec.seed,
        sequence_length=spec.seq_length,
        blend=([part.prefix for part in parts], [part.weight for part in parts]),
        # megatron-core reads digits and points only: no exponents.
        split=",".join(f"{share:.9f}" for share in parse_split(spec.split)),
        tokenizer=tokenizer,
        # One stream of text: attention and positions run across the ends of documents.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        id_limit=spec.vocab_size,
    )


def _index_folder(
    spec: DataSpec, parts: list[Part], *, tokenizer: Tokenizer, samples: Samples
) -> Path:
    """Where the indices of this very order of samples live: named by all that decides it."""
    files = []
    for part in parts:
        stat = Path(f"{part.prefix}.idx").stat()
        files.append((part.prefix, part.weight, stat.st_size, stat.st_mtime_ns))
    identity = [files, samples, spec.seq_length, spec.seed, parse_split(spec.split)]
    text = json.dumps([identity, tokenizer.unique_identifiers])
    return spec.cache / "indices" / hashlib.sha256(text.encode()).hexdigest()[:24]


def _build_indices(
    members: list[_Member], config: GPTDatasetConfig, *, samples: Samples, folder: Path
) -> None:
    """Let megatron-core build its indices in a folder aside, and rename it to `folder`."""
    aside = copy.copy(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(folder.parent) as made:
            aside.path_to_cache = str(Path(made, "indices"))
            _open(members, aside, samples=samples)
            try:
                Path(aside.path_to_cache).rename(folder)
            except OSError:
                if not folder.is_dir():  # not merely that another run was first
                    raise
    except OSError as error:
        raise unwritable("data.cache_dir", folder.parent, error) from None


def _open(
    members: list[_Member], config: GPTDatasetConfig, *, samples: Samples
) -> list[Dataset | None]:
    """The dataset of each split, from the indices in `config.path_to_cache`, built if absent."""
    from megatron.core.datasets.utils import Split

    from fp4pretrain.data.gpt import GPTDataset

    datasets: list[Dataset | None] = []
    on_disk = [GPTDataset.build_low_level_dataset(member.prefix, config) for member in members]
    for split, count in zip(Split, samples, strict=True):
        if count == 0:
            datasets.append(None)
            continue
        opened: list[Dataset] = []
        for member, tokens in zip(members, on_disk, strict=True):
            documents = np.asarray(member.splits[split.value], dtype=np.int32)
            share = count
            if len(members) > 1:
                share = math.ceil(math.ceil(count * member.weight) * _SURPLUS) + len(members)
            opened.append(GPTDataset(tokens, member.prefix, documents, share, split, config))
        weights = [member.weight for member in members]
        datasets.append(_blend(opened, weights, count, config=config))
    return datasets


def _blend(
    opened: list[Dataset], weights: list[float], count: int, *, config: GPTDatasetConfig
) -> Dataset:
    """`count` samples of several datasets, interleaved so that each keeps its share throughout."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    if len(opened) == 1:
        return opened[0]
    # The blend's own index is a few bytes a sample and quick to make: every rank makes it in
    # memory, since megatron-core 0.16 asks torch.distributed before it would cache it.
    uncached = copy.copy(config)
    uncached.path_to_cache = None
    with _quiet("megatron.core.datasets.blended_dataset"):
        blended: Dataset = BlendedDataset(opened, weights, count, uncached)
    return blended


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back one logger's warnings: here, that an index is not cached, which we chose."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
