"""What tests of datasets share: building them, and looking at what they predict."""

from __future__ import annotations

from typing import Any

import torch

from fp4pretrain.data.datasets import RunData, build_datasets
from fp4pretrain.data.spec import DataSpec
from fp4pretrain.parallel.agreement import agree


def build(spec: DataSpec, samples: int = 1, *, is_builder: bool = True) -> RunData:
    return build_datasets(spec, samples=samples, is_builder=is_builder, agree=agree)


def tokens_of(dataset: Any, count: int, *, first: int = 0) -> torch.Tensor:
    return torch.stack([dataset[first + i]["tokens"] for i in range(count)])


def predicted(dataset: Any) -> torch.Tensor:
    """All tokens that a validation set predicts."""
    found = [dataset[i] for i in range(len(dataset))]
    return torch.cat([one["labels"][one["loss_mask"] > 0] for one in found])


def held_out(data: RunData) -> Any:
    return data.valid["validation"]


def same(one: Any, other: Any) -> bool:
    """Two validation sets, bit for bit, the digest too."""
    equal = len(one) == len(other) and all(
        torch.equal(one[i][key], other[i][key]) for i in range(len(one)) for key in one[i]
    )
    assert equal == (one.digest == other.digest)
    return equal
