"""One validation set a dataset: for every run the same sequences, on one side of the split for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_lab import build, held_out, predicted, same, tokens_of

from fp4pretrain.data.indexed import write_dataset
from fp4pretrain.data.spec import DataSpec
from fp4pretrain.data.tokenizers import ByteTokenizer

MakeDataset = Callable[..., str]


@pytest.fixture
def spec(make_dataset: MakeDataset, tmp_path: Path) -> DataSpec:
    """50 documents of 41 tokens, about 30 for training, 10 for validation, 10 for tests."""
    cache = str(tmp_path / "cache")
    return DataSpec(path=make_dataset(), split="6,2,2", seq_length=32, seed=3, cache_dir=cache)


def test_splits_share_no_document_and_leave_none_out(spec: DataSpec) -> None:
    """Document i holds the id i only; all of each side is read."""
    data = build(spec)
    train = set(tokens_of(data.train, 60).unique().tolist()) - {256}
    valid = set(predicted(held_out(data)).unique().tolist()) - {256}
    assert not train & valid
    assert 15 < len(train) < 45
    tested = replace(spec, split="8,2")
    more = build(tested)
    train = set(tokens_of(more.train, 80).unique().tolist()) - {256}
    assert train | set(predicted(held_out(more)).unique().tolist()) - {256} == set(range(50))


def test_a_document_stays_on_its_side_when_the_corpus_grows(
    spec: DataSpec, make_dataset: MakeDataset
) -> None:
    """Other documents before, between and after it, and another order, change nothing."""
    before = set(predicted(held_out(build(spec))).unique().tolist()) - {256}
    grown = replace(spec, path=make_dataset("grown", documents=90))
    after = set(predicted(held_out(build(grown))).unique().tolist()) - {256}
    assert {i for i in after if i < 50} == before
    ids = [np.full(40, i, dtype=np.int64) for i in reversed(range(50))]
    prefix = str(spec.cache.parent / "reversed")
    write_dataset(iter(ids), prefix, tokenizer=ByteTokenizer(), source="a test")
    assert same(held_out(build(spec)), held_out(build(replace(spec, path=prefix))))


def test_validation_is_one_for_all_runs(spec: DataSpec, tmp_path: Path) -> None:
    """The same sequences in the same order for every seed and length, wherever the cache is."""
    for tokens in (None, 150):
        one = replace(spec, valid_tokens=tokens)
        first = held_out(build(one))
        for other in (
            replace(one, seed=4),
            replace(one, cache_dir=str(tmp_path / "elsewhere")),
        ):
            assert same(first, held_out(build(other, 1000)))
        assert not same(first, held_out(build(replace(one, seq_length=31))))
        assert not same(first, held_out(build(replace(one, split="7,1,2"))))


@pytest.mark.parametrize("tokens", [None, 10**9, 100, 32, 1])
def test_validation_reads_all_or_a_stated_number(spec: DataSpec, tokens: int | None) -> None:
    """Every token but the first is predicted once; fewer are spread over all of them."""
    whole = held_out(build(replace(spec, valid_tokens=None)))
    found = held_out(build(replace(spec, valid_tokens=tokens)))
    assert found.tokens == len(predicted(found))
    if tokens is None or tokens > 1000:
        assert same(found, whole)
        counts = Counter(predicted(found).tolist())
        assert {counts[i] for i in counts if i != 256} <= {39, 40}
        assert found.tokens == sum(counts.values()) == 41 * counts[256] - 1
    else:
        assert tokens <= found.tokens <= tokens + 31
        parts = {int(one[0]) for one in tokens_of(whole, len(whole))[:: len(whole) // len(found)]}
        assert {int(one[0]) for one in tokens_of(found, len(found))} <= parts


def test_other_text_validates_under_its_name(spec: DataSpec, make_dataset: MakeDataset) -> None:
    """Whole, the first is the main one; and then the validation share is trained on."""
    a, b = make_dataset("va", documents=5, first=100), make_dataset("vb", documents=3, first=200)
    data = build(replace(spec, valid={"b": b, "a": a}))
    assert list(data.valid) == ["b", "a"]
    assert set(predicted(data.valid["a"]).tolist()) == {*range(100, 105), 256}
    assert set(predicted(data.valid["b"]).tolist()) == {*range(200, 203), 256}
    usual = set(tokens_of(build(spec).train, 60).unique().tolist())
    shared = set(predicted(held_out(build(spec))).tolist())
    assert set(tokens_of(data.train, 80).unique().tolist()) == usual | shared
    assert same(build(replace(spec, valid=a)).valid["validation"], data.valid["a"])


def test_a_few_documents_keep_one_for_validation(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Where chance gives the share none of them."""
    for first in range(0, 200, 10):
        prefix = make_dataset("few", documents=6, first=first)
        spec = DataSpec(prefix, split="9,1", seq_length=8, cache_dir=str(tmp_path / "c"))
        data = build(spec)
        valid = set(predicted(held_out(data)).unique().tolist()) - {256}
        train = set(tokens_of(data.train, 60).unique().tolist()) - {256}
        assert valid
        assert not valid & train
        assert len(train) >= 3
