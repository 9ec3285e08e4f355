"""Tables give the documents that JSON lines of the same rows would, and broken ones are one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fp4pretrain.data import Reading, load_tokenizer, prepare_text
from fp4pretrain.data.text import list_files, read_documents
from fp4pretrain.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {i} of Füße" * (i % 5 + 1) for i in range(3000)]


def _parquet(path: Path, column: list[Any], key: str = "text") -> Path:
    pq.write_table(
        pa.table({key: column, "id": list(range(len(column)))}), path, row_group_size=700
    )
    return path


def _arrow(path: Path, column: list[Any], key: str = "text") -> Path:
    table = pa.table({key: column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    return path


def _read(*inputs: Path, reading: Reading | None = None) -> list[str]:
    return list(read_documents(list_files(inputs), reading))


@pytest.mark.parametrize("write", [_parquet, _arrow])
def test_a_tables_rows_are_documents_in_their_order(tmp_path: Path, write: Any) -> None:
    suffix = ".parquet" if write is _parquet else ".arrow"
    assert _read(write(tmp_path / f"a{suffix}", TEXTS)) == TEXTS
    named = write(tmp_path / f"b{suffix}", TEXTS, key="body")
    assert _read(named, reading=Reading("body")) == TEXTS
    with pytest.raises(UserError, match=r'no column "text" \(its columns: body.*--text-key'):
        _read(named)


@pytest.mark.parametrize("write", [_parquet, _arrow])
def test_a_row_without_text_is_named_or_counted(tmp_path: Path, write: Any) -> None:
    suffix = ".parquet" if write is _parquet else ".arrow"
    path = write(tmp_path / f"a{suffix}", ["one", None, "", "two", None])
    with pytest.raises(UserError, match=rf'{re.escape(str(path))} row 2 has no text in "text"'):
        _read(path)
    reading = Reading(skip=True)
    assert _read(path, reading=reading) == ["one", "two"]
    assert reading.skipped == 2
    numbers = write(tmp_path / f"n{suffix}", [1, 2])
    with pytest.raises(UserError, match="row 1 has no text"):
        _read(numbers)


def test_a_damaged_or_compressed_table_is_one_line(tmp_path: Path) -> None:
    whole = _parquet(tmp_path / "a.parquet", TEXTS).read_bytes()
    for name, content, told in (
        ("b.parquet", whole[:-100], "is damaged"),
        ("c.parquet", b"text", "is damaged"),
        ("d.arrow", b"text", "is damaged"),
        ("e.parquet.gz", whole, "is compressed as a whole"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=told) as caught:
            _read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_dataset_folder_gives_its_own_files_alone(tmp_path: Path) -> None:
    """As `Dataset.save_to_disk` writes it, with a cache that `map` left."""
    _arrow(tmp_path / "data-00000-of-00002.arrow", TEXTS[:10])
    _arrow(tmp_path / "data-00001-of-00002.arrow", TEXTS[10:20])
    _arrow(tmp_path / "cache-0123.arrow", ["not mine"])
    files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    state = {"_data_files": files, "_fingerprint": "0"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert sorted(_read(tmp_path)) == sorted(TEXTS[:20])
    selected = state | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(selected))
    with pytest.raises(UserError, match=r"a selection of a dataset's rows; .*flatten_indices"):
        _read(tmp_path)


def test_a_dataset_of_a_table_is_that_of_its_json_lines(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    table = _parquet(tmp_path / "a.parquet", TEXTS)
    for name, given in (("lines", lines), ("table", table)):
        prepare_text([given], tmp_path / name)
    for end in ("bin", "idx"):
        both = [(tmp_path / f"{name}.{end}").read_bytes() for name in ("lines", "table")]
        assert both[0] == both[1]


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = tmp_path / "made.model"
    with made.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=60, model_type="bpe",
            minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(str(made))
    ids = [one.tolist() for one in tokenizer.encode_batch(["document 7 of Füße", "1 document"])]
    assert [tokenizer.decode(one) for one in ids] == ["document 7 of Füße", "1 document"]
    assert (tokenizer.vocab_size, tokenizer.eod) == (60, 2)
    assert all(0 <= i < 60 and i != tokenizer.eod for one in ids for i in one)
    # a spelled-out end is text, only we end documents
    assert tokenizer.eod not in tokenizer.encode("</s> document").tolist()
    assert tokenizer.decode([*ids[0], tokenizer.eod, *ids[1], 99]).count("</s>") == 1
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"is not a SentencePiece model") as caught:
        load_tokenizer(str(tmp_path / "bad.model"))
    assert "\n" not in str(caught.value)
    endless = tmp_path / "endless.model"
    with endless.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=60,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(UserError, match="has no end-of-document token"):
        load_tokenizer(str(endless))
