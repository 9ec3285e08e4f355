"""Tests that need NVIDIA GPUs: ``make test-gpu``. Each says by skipping how many it lacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="session")
def gpu_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if not torch.cuda.is_available():  # nothing is hidden: without a GPU there is nothing to hold
        pytest.skip("needs a CUDA device; the same laws run on gloo in the ordinary suite")
    pool = Ranks(tmp_path_factory.mktemp("ranks"), device="cuda")
    yield pool
    pool.close()
