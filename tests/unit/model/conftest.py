"""A world of one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fp4pretrain.parallel.groups import World, join, leave, pick_device


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[World]:
    """On the GPU where there is one: the bridge to CPUs would last for the whole process."""
    yield join(device=pick_device("auto"))
    leave()
