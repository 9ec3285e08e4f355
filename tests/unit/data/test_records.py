"""Files as people have them: every kind and compression gives the same documents, in bounded memory;
damage is one line with file and row; nothing that is an input is written."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pretrain.data import build
from fp4pretrain.data.build import prepare_text, train_bpe
from fp4pretrain.data.records import Reading
from fp4pretrain.data.text import list_files, read_documents
from fp4pretrain.errors import UserError

STORIES = [
    "one",
    "two\nlines",
    "Füße \u2028 東京",
    "x" * 3_000_000,
    '"quoted", [brackets] {braces}',
]
RECORDS = [{"text": text, "id": i, "more": [1, {"a": "]"}]} for i, text in enumerate(STORIES)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()
KINDS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.JSONL": LINES,
    "a.json": LINES,
    "b.json": ARRAY,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "crlf.jsonl": LINES.replace(b"}\n", b"}\r\n"),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "b.json.GZ": gzip.compress(ARRAY, mtime=0),
    "a.jsonl.zst": zstandard.compress(LINES),
    "two.jsonl.zst": zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:]),
    "b.json.zst": zstandard.compress(ARRAY),
}


def texts(path: Path, **how: object) -> list[str]:
    # keywords of several types, as the test gives them
    return list(read_documents(list_files([path]), Reading(**how)))  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[name])
    assert texts(tmp_path / name) == STORIES


@settings(deadline=None)  # files on a busy machine
@given(st.lists(st.text(max_size=9)), st.integers(0, 3))
def test_arrays_of_any_text(
    tmp_path_factory: pytest.TempPathFactory, stories: list[str], indent: int
) -> None:
    path = tmp_path_factory.mktemp("law") / "some.json"
    path.write_text(json.dumps([{"text": text} for text in [*stories, "."]], indent=indent or None))
    assert texts(path) == [text for text in [*stories, "."] if text]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.zst"])
def test_compressed_text_in_a_folder(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    (tmp_path / name).write_bytes(pack(b"some text"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xff\xfe", mtime=0))  # not UTF-8: left out
    assert texts(tmp_path) == ["some text"]


# What is wrong with a file -> its name and content, and the line.
DAMAGED = [
    ("a.jsonl", b'{"text": "x"}\n{"te', r"a.jsonl line 2 is not JSON"),
    ("a.ndjson", b'{"text": "x"}\n{"text": "\xff"}', r"a.ndjson line 2 is not UTF-8"),
    ("a.jsonl", b'{"content": "x"}', r'a.jsonl line 1 has no string "text" \(its keys: content\)'),
    ("a.jsonl", b'["x"]', r"a.jsonl line 1 is not a JSON object"),
    ("a.jsonl", b"[" * 9999, r"a.jsonl line 1 is not JSON"),
    ("a.json", b'{\n  "data": 1\n}', r"a.json line 1 is not JSON"),
    ("a.json", b'[{"text": "x"}, {"text": "y"', r"a.json is no whole JSON array after element 1"),
    ("a.json", b'[{"text": "x"} {"text": "y"}]', r"a.json is no whole JSON array after element 0"),
    ("a.json", b'[{"text": "x"}, 12]', r"a.json element 2 is not a JSON object"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], r"a.jsonl.gz is damaged"),
    ("a.jsonl.gz", LINES, r"a.jsonl.gz is damaged"),
    (
        "a.jsonl.zst",
        zstandard.compress(LINES)[:-20],
        r"a.jsonl.zst is damaged \(it ends in the mid",
    ),
    ("a.jsonl.zst", LINES, r"a.jsonl.zst is damaged"),
    ("a.tar.gz", gzip.compress(b"x", mtime=0), r"a.tar.gz is an archive"),
]


@pytest.mark.parametrize(("name", "content", "says"), DAMAGED)
def test_damage_is_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^inputs: .*{says}") as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_broken_records_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"t": "x"}\n{"t\n{"t": 3}\n{"t": "\xff"}\n{"t": "y"}\n')
    reading = Reading("t", skip=True)
    assert list(read_documents(list_files([tmp_path / "a.jsonl"]), reading)) == ["x", "y"]
    assert reading.skipped == 3
    assert "a.jsonl line 2 is not JSON" in str(reading.first_skipped)


@pytest.mark.parametrize(
    "name", ["big.jsonl", "big.json", "big.txt", "big.jsonl.gz", "big.jsonl.zst"]
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """24 MB of text in less than 12 MB: chunks of one, and batches of another."""
    record = json.dumps({"text": "some words and more words\n" * 400})
    lines = f"{record}\n" * 2400
    content = f"[{lines[:-1].replace(chr(10), ',')}]" if name == "big.json" else lines
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content.encode()))
    del content, lines
    monkeypatch.setattr(build, "_BATCH_CHARACTERS", 1 << 18)
    tracemalloc.start()
    try:
        index = prepare_text([tmp_path / name], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert index.tokens > 24_000_000
    assert peak < 12_000_000


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["x.json", "x.bin", "x.idx"])
@pytest.mark.parametrize("force", [True, False])
def test_an_input_is_never_written(tmp_path: Path, name: str, force: bool) -> None:
    (tmp_path / name).write_text('{"text": "mine"}\n')
    (tmp_path / "link").symlink_to(tmp_path)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=r"^out: .* is one of the inputs"):
        prepare_text([tmp_path / name], tmp_path / "link" / "x", force=force)
    assert (tmp_path / name).read_bytes() == before
    with pytest.raises(UserError, match=r"^out: .* is one of the inputs"):
        (tmp_path / "t.json").write_text('{"text": "mine"}\n')
        train_bpe([tmp_path / "t.json"], 300, tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == '{"text": "mine"}\n'


def test_a_dataset_is_replaced_only_by_force_and_a_corpus_beside_it_never(tmp_path: Path) -> None:
    corpus, other = tmp_path / "in.txt", tmp_path / "other.txt"
    corpus.write_text("first")
    other.write_text("second one")
    prepare_text([corpus], tmp_path / "d")
    before = _digests(tmp_path)
    with pytest.raises(UserError, match=r"^out: .*d.idx exists; add --force"):
        prepare_text([other], tmp_path / "d")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "x"}\n{')
    with pytest.raises(UserError, match="broken.jsonl line 2"):
        prepare_text([broken], tmp_path / "d", force=True)
    broken.unlink()
    assert _digests(tmp_path) == before
    assert prepare_text([other], tmp_path / "d", force=True).tokens == len("second one") + 1
    (tmp_path / "mine.json").write_text('[{"text": "mine"}]')
    with pytest.raises(UserError, match=r"^out: .*mine.json is there and is no dataset's"):
        prepare_text([other], tmp_path / "mine", force=True)
    assert not (tmp_path / "mine.idx").exists()


def test_bytes_of_megatrons_own_builder(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n')
    prepare_text([tmp_path / "a.jsonl"], tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(257))
    for text in (b"one", b"three"):
        builder.add_document(np.array([*text, 256]), [len(text) + 1])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = tmp_path / f"ours.{suffix}", tmp_path / f"m.{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
