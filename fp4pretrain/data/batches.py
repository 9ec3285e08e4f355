"""Which samples a rank reads, and when: Megatron's order, exact under resume and any dp_size.

Sample n of the dataset is the n-th that the run consumes. Data-parallel rank r takes, of each slice
of micro_batch * dp_size consecutive samples, the r-th micro_batch of them: global microbatch
m * dp_size + r. So one rank reading two microbatches sees what two ranks see reading one each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class MicrobatchSampler(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of each microbatch of one rank, without end.

    Args:
        consumed_samples: how many of them ALL ranks together have read before.
        micro_batch: samples a microbatch.
        dp_rank: this rank's place in its data-parallel group.
        dp_size: size of that group.
        rotate: by how many places a microbatch's samples are rotated.
    """

    def __init__(
        self,
        *,
        consumed_samples: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        rotate: int = 0,
    ) -> None:
        self.rotate = rotate
        self.consumed_samples = consumed_samples
        self.micro_batch = micro_batch
        self.first = dp_rank * micro_batch
        self.slice = dp_size * micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.count():
            begin = self.consumed_samples + number * self.slice + self.first
            numbers = list(range(begin, begin + self.micro_batch))
            yield numbers[self.rotate :] + numbers[: self.rotate]


class EvaluationSampler(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of one rank's microbatches of a validation set, each sample once over all ranks.

    Microbatch m holds samples m * micro_batch on, whatever the number of ranks, so what a recipe
    scales by a whole microbatch is the same on every layout. Every rank gets ``microbatches``; numbers
    past the last sample stand for nothing, see `batches`.
    """

    def __init__(
        self, *, micro_batch: int, microbatches: int, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self.micro_batch = micro_batch
        self.numbers = range(dp_rank, microbatches * dp_size, dp_size)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            begin = number * self.micro_batch
            yield list(range(begin, begin + self.micro_batch))


def batches(
    dataset: torch.utils.data.Dataset[dict[str, Any]],
    *,
    consumed_samples: int,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    rotate: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of one rank from `consumed_samples` on; training data has no end.

    Args:
        dataset: one of `build_datasets`.
        consumed_samples: how many samples of it all ranks together have read before.
        micro_batch: samples a microbatch.
        dp_rank: this rank's place in its data-parallel group.
        dp_size: size of that group.
        rotate: by how many places a microbatch's samples are rotated.
        num_workers: processes that read ahead; 0 reads in this one.

    Yields:
        tokens, labels, position_ids int64 and loss_mask fp32, each [micro_batch, seq], on the CPU;
        in pinned memory where there is a GPU to copy them to. And documents int64, where attention stops
        at ends of documents.
    """
    sampler = MicrobatchSampler(
        consumed_samples=consumed_samples,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        rotate=rotate,
    )
    yield from _loaded(dataset, sampler, num_workers=num_workers)


def evaluation_batches(
    dataset: torch.utils.data.Dataset[dict[str, Any]], sampler: EvaluationSampler
) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of a validation set, as `batches` yields them.

    Rows past the last sample repeat that one with a loss_mask of zeros.
    """
    yield from _loaded(_Padded(dataset), sampler)


class _Padded(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, dataset: torch.utils.data.Dataset[dict[str, Any]]) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        last = len(self._dataset) - 1  # type: ignore[arg-type]
        sample = self._dataset[min(number, last)]
        if number > last:
            sample = {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
        return sample


def _loaded(
    dataset: torch.utils.data.Dataset[dict[str, Any]],
    sampler: torch.utils.data.Sampler[list[int]],
    *,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: a loader seeds its workers from the global one otherwise, and making a
        # loader for an evaluation would change the training run's random numbers.
        generator=torch.Generator(),
    )
    yield from loader


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
