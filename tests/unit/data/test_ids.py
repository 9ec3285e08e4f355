"""Ids of foreign datasets: -1 is padding, masked and counted; any other id that a model has not is one
line with document and id, whether it is found before training or by the sample."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fp4pretrain.data import ids
from fp4pretrain.data.build import inspect, prepare_text, train_bpe
from fp4pretrain.data.datasets import build_datasets
from fp4pretrain.data.entropy import unigram_entropy
from fp4pretrain.data.spec import DataSpec, validate
from fp4pretrain.errors import LocalError, UserError

Foreign = Callable[..., DataSpec]
DOCUMENTS, LENGTH = 50, 40


@pytest.fixture
def foreign(tmp_path: Path) -> Foreign:
    """A dataset of Megatron's own tools: 50 documents of 40 tokens, ids 0 to 99, but for a few."""

    def make(dtype: type = np.int32, **places: int) -> DataSpec:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        tokens = (np.arange(DOCUMENTS * LENGTH) % 100).reshape(DOCUMENTS, LENGTH)
        for place, value in places.items():
            document, column = map(int, place.removeprefix("at_").split("_"))
            tokens[document, column] = value
        prefix = str(tmp_path / "foreign")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for row in tokens:
            builder.add_document(row.astype(dtype), [LENGTH])
        builder.finalize(f"{prefix}.idx")
        cache = str(tmp_path / "cache")
        return DataSpec(prefix, split="8,2", seq_length=39, cache_dir=cache, vocab_size=257)

    return make


def first_epoch(spec: DataSpec) -> list[dict[str, torch.Tensor]]:
    """Three epochs of the training samples (each leaves out another last piece), and the validation set."""
    data = build_datasets(spec, samples=120, is_builder=True, agree=agree)
    held_out = next(iter(data.valid.values()))
    return [data.train[i] for i in range(120)] + [held_out[i] for i in range(len(held_out))]


def agree(error: UserError | None) -> None:
    if error is not None:
        raise error


def test_padding_is_masked_and_counted(
    foreign: Foreign, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = foreign(at_3_5=-1, at_3_6=-1, at_4_7=-1)
    validate(spec)
    samples = first_epoch(spec)
    assert "3 of 2,000 tokens read of" in capsys.readouterr().out
    masked = sum(int((sample["loss_mask"] == 0).sum()) for sample in samples)
    assert masked >= 3
    assert min(int(sample["tokens"].min()) for sample in samples) >= 0
    data = build_datasets(spec, samples=9, is_builder=True, agree=agree)
    assert 0 < unigram_entropy(next(iter(data.valid.values()))) < math.log(100)
    console = Console(record=True, width=120, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    inspect(str(spec.path), tokenizer="byte", console=console)
    assert "3 of 2,000" in console.export_text()


@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        (np.int32, -100, r"data.path: document 7 of \S+ holds ids down to -100; only -1"),
        (np.int16, -25_000, r"data.path: document 7 of .* \(ids above 32767 do not fit its int16"),
        (np.int32, 999, r"model.vocab_size: 257 leaves out token id 999 of document 7 of "),
    ],
)
def test_other_ids_are_one_line(foreign: Foreign, dtype: type, value: int, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        validate(foreign(dtype, at_7_5=value))


@pytest.mark.parametrize("value", [-100, 257])
def test_what_the_first_look_misses_is_found_by_the_sample(
    foreign: Foreign, monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    """A dataset too large to be read first: windows of 2 tokens, none over the wrong one."""
    monkeypatch.setattr(ids, "_SCAN_TOKENS", 128)
    spec = foreign(at_7_12=value)
    validate(spec)
    with pytest.raises(LocalError, match=rf"document 7 of \S+foreign holds token id {value}, "):
        first_epoch(spec)


def test_a_moved_tokenizer_does_not_hide_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is recorded as the file it means; one that is gone leaves the facts."""
    (tmp_path / "a.txt").write_text("some words " * 99)
    monkeypatch.chdir(tmp_path)
    train_bpe(["a.txt"], 270, "bpe.json")
    prepare_text(["a.txt"], "d", "bpe.json")
    for gone in (False, True):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        console = Console(record=True, width=200)
        inspect(tmp_path / "d", console=console)
        shown = console.export_text()
        assert ("some words" in shown) is not gone
        assert ("name it with --tokenizer" in shown) is gone
        (tmp_path / "bpe.json").rename(tmp_path / "moved.json") if not gone else None
    validate(
        replace(
            DataSpec(str(tmp_path / "d"), tokenizer=str(tmp_path / "moved.json"), seq_length=9),
            split="1,2",
            cache_dir=str(tmp_path / "cache"),
        ),
    )


@pytest.mark.parametrize("key", ["path", "cache_dir", "tokenizer"])
def test_home_folders_that_are_not_there(key: str) -> None:
    with pytest.raises(UserError, match=rf"^data.{key}: ~nosuch/x names a home folder that is not"):
        change: dict[str, Any] = {key: "~nosuch/x"}
        validate(replace(DataSpec(), **change))
