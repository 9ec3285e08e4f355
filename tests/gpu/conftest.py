"""Tests that need NVIDIA GPUs: ``make test-gpu``. Each says by skipping how many it lacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="session")
def gpu_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if torch.cuda.device_count() < 2:
        # NCCL puts one rank on a GPU; the same law runs on gloo in the ordinary suite
        pytest.skip(f"needs 2 GPUs, there are {torch.cuda.device_count()}")
    pool = Ranks(tmp_path_factory.mktemp("ranks"), device="cuda")
    yield pool
    pool.close()
