"""Small datasets whose tokens tell which document they came from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fp4pretrain.data.indexed import write_dataset
from fp4pretrain.data.tokenizers import ByteTokenizer

sys.path.insert(0, str(Path(__file__).parent))  # the tests here share data_lab.py

MakeDataset = Callable[..., str]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write documents, the i-th of them `length` times the id `first + i`; returns the prefix."""

    def make(name: str = "data", *, documents: int = 50, length: int = 40, first: int = 0) -> str:
        prefix = str(tmp_path / name)
        ids = (np.full(length, first + i, dtype=np.int64) for i in range(documents))
        write_dataset(ids, prefix, tokenizer=ByteTokenizer(), source="a test")
        return prefix

    return make
