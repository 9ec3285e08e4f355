"""Records of a prompt and an answer: the model reads both and predicts the answer alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fp4pretrain.data import prepare_text
from fp4pretrain.data.datasets import RunData, build_datasets
from fp4pretrain.data.records import Reading
from fp4pretrain.data.spec import DataSpec
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.agreement import agree

ASKED = Reading("answer", prompt_key="question")
END = 256


def build(spec: DataSpec) -> RunData:
    return build_datasets(spec, samples=1, is_builder=True, agree=agree)


def records(count: int = 40) -> list[dict[str, str]]:
    """Questions in capital letters, of 0 to 6 of them; answers in small ones."""
    return [{"question": "Q" * (i % 7), "answer": "a" * (1 + i % 5)} for i in range(count)]


def written(folder: Path, name: str, rows: list[dict[str, str]] | None = None) -> str:
    path = folder / name
    rows = records() if rows is None else rows
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    prefix = str(tmp_path / "asked")
    prepare_text([written(tmp_path, "asked.jsonl")], prefix, reading=replace(ASKED))
    return DataSpec(prefix, split="6,4", seq_length=24, cache_dir=str(tmp_path / "cache"))


def all_of(dataset: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and which of them are predicted."""
    found = [dataset[i] for i in range(count)]
    return tuple(torch.cat([one[key] for one in found]) for key in ("labels", "loss_mask"))


def test_answers_and_their_ends_are_predicted_alone(spec: DataSpec) -> None:
    data = build(spec)
    valid = data.valid["validation"]
    for dataset, count in ((data.train, 2 * data.train.epoch_samples), (valid, len(valid))):
        labels, counted = all_of(dataset, count)
        question = labels == ord("Q")
        assert question.any()
        assert not counted[question].any()
    labels, counted = all_of(data.train, data.train.epoch_samples)
    assert counted[labels != ord("Q")].all()
    assert valid.tokens == sum(int(valid[i]["loss_mask"].sum()) for i in range(len(valid)))


def test_prompts_are_in_the_digests(spec: DataSpec, tmp_path: Path) -> None:
    """The same tokens in the same order, with and without a prompt, are not one experiment."""
    prefix = str(tmp_path / "whole")
    whole = [{"answer": row["question"] + row["answer"]} for row in records()]
    prepare_text([written(tmp_path, "whole.jsonl", whole)], prefix, reading=Reading("answer"))
    asked, plain = build(spec), build(replace(spec, path=prefix))
    assert torch.equal(asked.train[3]["tokens"], plain.train[3]["tokens"])
    assert asked.digest != plain.digest
    assert asked.valid["validation"].digest != plain.valid["validation"].digest
    assert plain.train[3]["loss_mask"].all()


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_every_kind_of_record_gives_the_same(spec: DataSpec, tmp_path: Path, name: str) -> None:
    prefix = str(tmp_path / "other")
    prepare_text([written(tmp_path, name)], prefix, reading=replace(ASKED))
    assert build(replace(spec, path=prefix)).digest == build(spec).digest


def test_broken_prompts_are_lines_or_are_counted(tmp_path: Path) -> None:
    rows: list[Any] = [*records(3), {"answer": "x"}, {"answer": "x", "question": 5}]
    path = written(tmp_path, "broken.jsonl", rows)
    with pytest.raises(
        UserError, match=r'broken.jsonl line 4 has no string "question" .*--prompt-key'
    ):
        prepare_text([path], tmp_path / "a", reading=replace(ASKED))
    reading = replace(ASKED, skip=True)
    assert prepare_text([path], tmp_path / "a", reading=reading).documents == 3
    assert reading.skipped == 2
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(UserError, match=r"^--prompt-key: .*plain.txt is plain text"):
        prepare_text([tmp_path / "plain.txt"], tmp_path / "b", reading=replace(ASKED))
    with pytest.raises(UserError, match=r'has no column "asked" .*the prompt with --prompt-key'):
        prepare_text(
            [written(tmp_path, "a.parquet")],
            tmp_path / "b",
            reading=Reading("answer", prompt_key="asked"),
        )
