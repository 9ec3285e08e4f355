"""The data verb: what is built is what was said, and can be looked into; entropy is Shannon's."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from fp4pretrain.data.build import inspect, prepare_text, train_bpe
from fp4pretrain.data.datasets import RandomTokens, build_datasets
from fp4pretrain.data.entropy import unigram_entropy
from fp4pretrain.data.spec import DataSpec
from fp4pretrain.data.tokenizers import load_tokenizer
from fp4pretrain.errors import UserError

MakeDataset = Callable[..., str]


def agree(problem: UserError | None) -> None:
    if problem is not None:
        raise problem


STORIES = [f"Story {i} of {'many ' * i}words.\n" for i in range(30)]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    file = tmp_path / "stories.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in STORIES))
    return file


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_prepared_text_decodes_to_itself(stories: Path, tmp_path: Path, kind: str) -> None:
    name = "byte" if kind == "byte" else str(train_bpe([stories], 280, tmp_path / "bpe"))
    index = prepare_text([stories], tmp_path / "out" / "stories", name)
    tokenizer = load_tokenizer(name)
    assert index.documents == len(STORIES)
    for i, text in enumerate(STORIES):
        ids = index.read(index.offset(i), index.offset(i + 1)).tolist()
        assert ids[-1] == tokenizer.eod
        assert tokenizer.decode(ids[:-1]) == text
    assert index.meta["tokenizer"] == name
    assert index.meta["largest_id"] == index.read(0, index.tokens).max()


def test_train_on_what_was_prepared(stories: Path, tmp_path: Path) -> None:
    prefix = str(tmp_path / "stories")
    prepare_text([stories], prefix)
    spec = DataSpec(prefix, split="9,1", seq_length=32, cache_dir=str(tmp_path / "cache"))
    train = build_datasets(spec, samples=4, is_builder=True, agree=agree).train
    for i in range(4):
        text = load_tokenizer("byte").decode(train[i]["tokens"].tolist())
        pieces = text.split("<|endoftext|>")
        assert all(any(piece in story for story in STORIES) for piece in pieces)


def test_inspect_shows_the_facts(stories: Path, tmp_path: Path) -> None:
    prepare_text([stories], tmp_path / "stories")
    out = io.StringIO()
    index = inspect(tmp_path / "stories", console=Console(file=out, width=120))
    shown = out.getvalue()
    tokens = sum(len(text) + 1 for text in STORIES)
    assert index.tokens == tokens
    for fact in (f"{tokens:,}", "uint16", "byte", "stories.jsonl", "Story 0 of words.", "256"):
        assert fact in shown


def test_inspect_a_foreign_dataset(make_dataset: MakeDataset) -> None:
    prefix = make_dataset(first=65)
    Path(f"{prefix}.json").unlink()
    for tokenizer, sample in ((None, False), ("byte", True)):
        out = io.StringIO()
        inspect(prefix, tokenizer=tokenizer, console=Console(file=out, width=120))
        assert "not recorded" in out.getvalue()
        assert ("AAAA" in out.getvalue()) is sample


def test_inspect_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^prefix: .*absent.idx is missing"):
        inspect(tmp_path / "absent")


def test_entropy_of_known_frequencies() -> None:
    assert unigram_entropy(np.arange(64)) == pytest.approx(math.log(64))
    assert unigram_entropy(torch.tensor([[7, 7], [7, 7]])) == 0
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert unigram_entropy([5, 5, 5, 0]) == pytest.approx(expected)
    mock = RandomTokens(9, seq_length=4, vocab_size=50, seed=1, stream=0)
    assert unigram_entropy(mock) == pytest.approx(math.log(50))


def test_entropy_of_datasets(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Of what a validation set predicts: padding counts for nothing."""
    blend = {"a": {"prefix": make_dataset("a")}, "b": {"prefix": make_dataset("b", first=100)}}
    spec = DataSpec(make_dataset("a"), split="8,2", seq_length=32, cache_dir=str(tmp_path / "c"))
    mixed = DataSpec(blend, split="8,2", seq_length=32, cache_dir=str(tmp_path / "c"))

    def entropy(counts: NDArray[np.int64]) -> float:
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    for one in (spec, mixed):
        found = build_datasets(one, samples=9, is_builder=True, agree=agree).valid["validation"]
        read = [found[i] for i in range(len(found))]
        labels = torch.cat([one["labels"][one["loss_mask"] > 0] for one in read])
        assert unigram_entropy(found) == pytest.approx(entropy(labels.bincount().numpy()))
        assert len(labels) == found.tokens
