"""A world of one rank, and linears in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fp4pretrain.parallel.groups import World, join, leave, pick_device

sys.path.insert(0, str(Path(__file__).parent))  # the tests here share linear_lab.py


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[World]:
    """On the GPU where there is one: the bridge to CPUs would last for the whole process."""
    yield join(device=pick_device("auto"))
    leave()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
