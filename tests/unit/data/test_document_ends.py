"""Laws of what the end of a document means: which document a token is of, its position, what is predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pretrain.data.datasets import RunData, build_datasets
from fp4pretrain.data.indexed import read_index, write_dataset
from fp4pretrain.data.spec import ENDS, DataSpec, validate
from fp4pretrain.data.stream import Ends, document_places, sample_of
from fp4pretrain.data.tokenizers import ByteTokenizer
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.agreement import agree

MakeDataset = Callable[..., str]
END = 256


def build(spec: DataSpec) -> RunData:
    return build_datasets(spec, samples=1, is_builder=True, agree=agree)


@pytest.fixture
def spec(make_dataset: MakeDataset, tmp_path: Path) -> DataSpec:
    """50 documents of 41 tokens, document i of the id i."""
    cache = str(tmp_path / "cache")
    return DataSpec(path=make_dataset(), split="6,4", seq_length=100, cache_dir=cache)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_places_are_those_counted_one_by_one(ends: list[bool]) -> None:
    document, position = 0, 0
    expected = []
    for end in ends:
        expected.append((document, position))
        document, position = (document + 1, 0) if end else (document, position + 1)
    documents, positions = document_places(torch.tensor([ends, ends]))
    for row in range(2):
        assert list(zip(documents[row].tolist(), positions[row].tolist(), strict=True)) == expected


def test_a_sample_says_which_document_a_token_is_of(spec: DataSpec) -> None:
    data = build(replace(spec, document_mask=True, reset_positions=True, eod_mask_loss=True))
    for dataset in (data.train, data.valid["validation"]):
        sample = dataset[0]
        tokens, documents = sample["tokens"], sample["documents"]
        assert int(documents[-1]) >= 2
        for number in range(int(documents[-1]) + 1):
            mine = documents == number
            assert len(set(tokens[mine].tolist()) - {END}) <= 1
            assert torch.equal(sample["position_ids"][mine], torch.arange(int(mine.sum())))
        assert torch.equal(sample["loss_mask"] == 0, tokens == END)


def test_the_text_and_its_order_stay(spec: DataSpec) -> None:
    """No option moves a token; what is not predicted makes it another validation set, and no other
    option does."""
    plain = build(spec)
    for name in ENDS:
        other = build(replace(spec, **{name: True}))
        assert torch.equal(plain.train[3]["tokens"], other.train[3]["tokens"])
        assert plain.digest == other.digest
        one, two = plain.valid["validation"], other.valid["validation"]
        assert (one.digest == two.digest) == (name != "eod_mask_loss")
        counted = sum(int(two[i]["loss_mask"].sum()) for i in range(len(two)))
        assert two.tokens == counted
        assert (one.tokens == two.tokens) == (name != "eod_mask_loss")


def test_mock_tokens_have_ends_too(tmp_path: Path) -> None:
    spec = DataSpec(mock=True, seq_length=512, valid_tokens=2048, cache_dir=str(tmp_path))
    plain, masked = build(spec), build(replace(spec, document_mask=True, eod_mask_loss=True))
    sample = masked.train[0]
    assert torch.equal(plain.train[0]["tokens"], sample["tokens"])
    assert int(sample["documents"][-1]) == int((sample["tokens"][:-1] == END).sum())
    valid = masked.valid["validation"]
    assert 0 < valid.tokens < plain.valid["validation"].tokens
    assert valid.digest != plain.valid["validation"].digest


def test_padding_ends_no_document_where_the_end_is_id_0() -> None:
    text = np.array([5, 0, 7, -1, -1, 8], dtype=np.int64)
    sample = sample_of(text, 5, meaning=Ends(0, mask=True, no_loss=True))
    assert sample["documents"].tolist() == [0, 0, 1, 1, 1]
    assert sample["loss_mask"].tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("name", ENDS)
def test_a_dataset_without_ends_is_refused(spec: DataSpec, tmp_path: Path, name: str) -> None:
    """As Megatron's tools write it without --append-eod."""
    index = read_index(str(spec.path))
    Path(f"{spec.path}.json").unlink()
    raw = np.fromfile(f"{spec.path}.bin", dtype=index.dtype)
    raw[raw == END] = 7
    raw.tofile(f"{spec.path}.bin")
    validate(spec)
    with pytest.raises(UserError, match=rf"^data\.{name}: .* has no token 256, .*--append-eod"):
        validate(replace(spec, **{name: True}))


def test_validation_without_a_token_in_the_loss_is_refused(tmp_path: Path, spec: DataSpec) -> None:
    prefix = str(tmp_path / "ends")
    empty: Any = (np.zeros(0, dtype=np.int64) for _ in range(200))
    write_dataset(empty, prefix, tokenizer=ByteTokenizer(), source="a test")
    with pytest.raises(UserError, match=r"^data\.valid: no token of 'validation' is in the loss"):
        build(replace(spec, valid=prefix, eod_mask_loss=True))
