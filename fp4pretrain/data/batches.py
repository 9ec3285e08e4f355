"""Which samples a rank reads, and when: Megatron's order, exact under resume and any dp_size.

Sample n of the dataset is the n-th that the run consumes. Data-parallel rank r takes, of each slice
of micro_batch * dp_size consecutive samples, the r-th micro_batch of them: global microbatch
m * dp_size + r. So one rank reading two microbatches sees what two ranks see reading one each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class MicrobatchSampler(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of each microbatch of one rank; a last slice that is not full is dropped.

    Args:
        samples: length of the dataset.
        consumed_samples: how many of them ALL ranks together have read before.
        micro_batch: samples a microbatch.
        dp_rank: this rank's place in its data-parallel group.
        dp_size: size of that group.
    """

    def __init__(
        self,
        samples: int,
        *,
        consumed_samples: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.samples = samples
        self.consumed_samples = consumed_samples
        self.micro_batch = micro_batch
        self.first = dp_rank * micro_batch
        self.slice = dp_size * micro_batch

    def __len__(self) -> int:
        return max(0, self.samples - self.consumed_samples) // self.slice

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            begin = self.consumed_samples + number * self.slice + self.first
            yield list(range(begin, begin + self.micro_batch))


def batches(
    dataset: torch.utils.data.Dataset[dict[str, Any]],
    *,
    consumed_samples: int,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of one rank from `consumed_samples` on, until the dataset ends.

    Args:
        dataset: one of `build_datasets`.
        consumed_samples: how many samples of it all ranks together have read before.
        micro_batch: samples a microbatch.
        dp_rank: this rank's place in its data-parallel group.
        dp_size: size of that group.
        num_workers: processes that read ahead; 0 reads in this one.

    Yields:
        tokens, labels, position_ids int64 and loss_mask fp32, each [micro_batch, seq], on the CPU;
        in pinned memory where there is a GPU to copy them to.
    """
    sampler = MicrobatchSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed_samples,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
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
    return {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}
