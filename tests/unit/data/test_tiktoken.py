"""Laws of tiktoken's files: text survives, nothing is guessed, damage is one line."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4pretrain.convert.tokenizer import exportable
from fp4pretrain.data import prepare_text
from fp4pretrain.data.tokenizers import END_OF_TEXT, load_tokenizer
from fp4pretrain.errors import UserError

tiktoken = pytest.importorskip("tiktoken")
MERGES = [b"th", b"the", b" the", b"in", b"ing"]
HOW = {"pat_str": r" ?\p{L}+|\s|[^\s\p{L}]+", "special_tokens": {END_OF_TEXT: 300}}


def written(folder: Path, name: str = "own", *, how: object = HOW) -> str:
    tokens = [*(bytes([byte]) for byte in range(256)), *MERGES]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / f"{name}.tiktoken").write_text("\n".join(lines) + "\n")
    if how is not None:
        (folder / f"{name}.json").write_text(json.dumps(how))
    return str(folder / f"{name}.tiktoken")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("own"))


@settings(deadline=None)
@given(text=st.text())
def test_any_unicode_survives_and_ids_stay_in_range(own: str, text: str) -> None:
    tokenizer = load_tokenizer(own)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert all(0 <= one < 261 for one in ids.tolist())
    assert tokenizer.vocab_size == 301


def test_merges_and_spelled_out_ends(own: str) -> None:
    tokenizer = load_tokenizer(own)
    assert tokenizer.eod == 300
    assert tokenizer.encode("the thing").tolist() == [257, 32, 256, 260]
    assert 300 not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode([257, 300, 280]) == f"the{END_OF_TEXT}\ufffd"


def test_how_it_is_used_is_in_the_fingerprint(own: str, tmp_path: Path) -> None:
    same = load_tokenizer(written(tmp_path)).fingerprint
    assert same == load_tokenizer(own).fingerprint
    assert load_tokenizer(written(tmp_path, how=HOW | {"pat_str": "."})).fingerprint != same
    moved = {END_OF_TEXT: 301}
    assert (
        load_tokenizer(written(tmp_path, how=HOW | {"special_tokens": moved})).fingerprint != same
    )


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_encodings_of_openai_are_known_by_name(tmp_path: Path, name: str) -> None:
    """Their own merges are not at hand here: the bytes alone, split as those encodings split."""
    tokenizer = load_tokenizer(written(tmp_path, name, how=None))
    text = "It's 2026's 12345th\n\n  test, naïve 東京"
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.eod == {"r": 50256, "c": 100257, "o": 199999}[name[0]]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (None, r"is none of r50k_base.*put own.json beside it"),
        ({"pat_str": 3, "special_tokens": {}}, r"does not say how own.tiktoken is used"),
        ([], r"does not say how"),
        (HOW | {"special_tokens": {"<|start|>": 300}}, r"no end-of-document token"),
        (HOW | {"pat_str": "("}, r"tiktoken cannot use .*; correct its pat_str"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, how: object, says: str) -> None:
    with pytest.raises(UserError, match=f"^data\\.tokenizer: .*{says}"):
        load_tokenizer(written(tmp_path, how=how))


def test_damaged_files_are_named_by_line(tmp_path: Path) -> None:
    path = Path(written(tmp_path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], "?? 9", *lines[10:]]))
    with pytest.raises(UserError, match=r"own.tiktoken line 10 is no token"):
        load_tokenizer(str(path))
    path.write_text("\n".join(lines[3:]))
    with pytest.raises(UserError, match=r"lacks 3 of the 256 single bytes"):
        load_tokenizer(str(path))


def test_without_the_package_one_line_says_how_to_get_it(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(
        UserError, match=r"^data\.tokenizer: needs the tiktoken package; pip install"
    ):
        load_tokenizer(own)


def test_a_dataset_is_built_with_it_and_it_is_not_exported(own: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the thing")
    index = prepare_text([tmp_path / "a.txt"], tmp_path / "a", own)
    assert index.read(0, 5).tolist() == [257, 32, 256, 260, 300]
    with pytest.raises(UserError, match=r"^--tokenizer: transformers may split words otherwise"):
        exportable(load_tokenizer(own))
