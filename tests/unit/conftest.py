"""Groups that a module's tests formed end with it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def _groups_end() -> Iterator[None]:
    """A group has threads that look for work a hundred times a second: hundreds of them slow every test."""
    yield
    if dist.is_initialized():
        from fp4pretrain.parallel.groups import leave

        leave()
        gc.collect()
