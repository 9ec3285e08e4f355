"""Laws of the order of samples: ranks partition it, resume continues it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pretrain.data.batches import (
    EvaluationSampler,
    MicrobatchSampler,
    batches,
    evaluation_batches,
)
from fp4pretrain.data.datasets import RandomTokens

small = st.integers(1, 5)


def order(samples: int, consumed: int, micro_batch: int, ranks: int) -> list[list[list[int]]]:
    """[rank][microbatch][row] sample numbers, of about ``samples`` of the endless order."""
    return [
        list(
            islice(
                MicrobatchSampler(
                    consumed_samples=consumed, micro_batch=micro_batch, dp_rank=rank, dp_size=ranks
                ),
                (samples - consumed) // (micro_batch * ranks),
            )
        )
        for rank in range(ranks)
    ]


@given(st.integers(0, 100), small, small)
def test_ranks_partition_one_ranks_order(samples: int, micro_batch: int, ranks: int) -> None:
    """Microbatch m of rank r is a single rank's m * ranks + r: none is missing or twice."""
    (single,) = order(samples, 0, micro_batch, 1)
    many = order(samples, 0, micro_batch, ranks)
    interleaved = [rows for at_once in zip(*many, strict=True) for rows in at_once]
    assert interleaved == single[: len(single) // ranks * ranks]


@given(small, small, st.integers(0, 8))
def test_resume_continues(micro_batch: int, ranks: int, done: int) -> None:
    whole = order(200, 0, micro_batch, ranks)
    resumed = order(200, done * micro_batch * ranks, micro_batch, ranks)
    assert resumed == [of_rank[done:] for of_rank in whole]


@settings(deadline=None)  # it starts loaders
@given(st.integers(1, 40), small, small)
def test_an_evaluation_reads_every_sample_once(
    sequences: int, micro_batch: int, ranks: int
) -> None:
    """Whatever the ranks: the microbatches are the same, and what is more than the set counts nothing."""
    dataset = RandomTokens(sequences, seq_length=4, vocab_size=10**9, seed=1, stream=1)
    each = -(-sequences // (micro_batch * ranks))
    read: dict[int, torch.Tensor] = {}
    for rank in range(ranks):
        sampler = EvaluationSampler(
            micro_batch=micro_batch, microbatches=each, dp_rank=rank, dp_size=ranks
        )
        found = list(evaluation_batches(dataset, sampler))
        assert len(found) == each
        for call, batch in enumerate(found):
            assert batch["tokens"].shape == (micro_batch, 4)
            for row, counts in enumerate(batch["loss_mask"].sum(dim=1) > 0):
                number = (call * ranks + rank) * micro_batch + row
                assert bool(counts) == (number < sequences)
                if counts:
                    read[number] = batch["tokens"][row]
    assert sorted(read) == list(range(sequences))
    assert all(torch.equal(read[i], dataset[i]["tokens"]) for i in range(sequences))


def test_resume_at_another_data_parallel_size() -> None:
    """One global batch of 8 is the same set of samples however it is spread."""
    for ranks, micro_batch in ((1, 8), (2, 2), (4, 1), (8, 1)):
        per_rank = 8 // (ranks * micro_batch)
        read = order(64, 16, micro_batch, ranks)
        numbers = [n for of_rank in read for rows in of_rank[:per_rank] for n in rows]
        assert sorted(numbers) == list(range(16, 24))


@pytest.fixture
def dataset() -> RandomTokens:
    return RandomTokens(None, seq_length=16, vocab_size=100, seed=1, stream=0)


def read(dataset: RandomTokens, count: int, **knobs: Any) -> list[dict[str, torch.Tensor]]:
    """The first ``count`` microbatches."""
    knobs = {"consumed_samples": 0, "micro_batch": 2} | knobs
    return list(islice(batches(dataset, **knobs), count))


def test_batches_hold_the_samples_in_order(dataset: RandomTokens) -> None:
    found = read(dataset, 4, consumed_samples=4, dp_rank=1, dp_size=2)
    assert len(found) == 4
    for number, batch in enumerate(found):
        first = 4 + number * 4 + 2
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            expected = torch.stack([dataset[first + row][key] for row in range(2)])
            assert torch.equal(batch[key], expected)
            assert batch[key].shape == (2, 16)
            assert batch[key].dtype == (torch.float32 if key == "loss_mask" else torch.int64)


def test_workers_change_nothing(dataset: RandomTokens) -> None:
    here, there = read(dataset, 10), read(dataset, 10, num_workers=2)
    assert len(here) == 10
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_reading_leaves_the_global_generator_alone(dataset: RandomTokens) -> None:
    """An evaluation between two steps must not change the dropout of the second."""
    state = torch.get_rng_state()
    read(dataset, 3)
    assert torch.equal(state, torch.get_rng_state())
