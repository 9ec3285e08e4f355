"""Laws of the tokenizers: text survives, ids stay in range, only we end documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4pretrain.data.build import train_bpe
from fp4pretrain.data.tokenizers import END_OF_TEXT, ByteTokenizer, load_tokenizer
from fp4pretrain.errors import UserError

PROSE = "def f(x):\n    return x + 1\n" * 50 + "naïve façade, Füße, 東京, 🙂\n" * 20


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "prose.txt").write_text(PROSE)
    return train_bpe([folder / "prose.txt"], 300, folder / "made")


@given(st.text())
def test_bytes_survive_any_unicode(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert len(ids) == len(text.encode())
    assert tokenizer.eod not in ids


@given(st.lists(st.integers(0, 300)))
def test_any_ids_decode(ids: list[int]) -> None:
    """A sample may begin in the middle of a character, and a padded head may emit ids past 256."""
    assert ByteTokenizer().decode(ids).count(END_OF_TEXT) == ids.count(256)


@given(text=st.text())
def test_bpe_survives_any_unicode(bpe_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_bpe_compresses_what_it_was_trained_on(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    ids = tokenizer.encode(PROSE)
    assert len(ids) < len(PROSE.encode()) / 2
    assert 257 < tokenizer.vocab_size <= 300
    assert ids.max() < tokenizer.vocab_size


def test_bpe_training_repeats(bpe_file: Path, tmp_path: Path) -> None:
    again = train_bpe([bpe_file.parent.parent / "prose.txt"], 300, tmp_path / "again.json")
    assert again.read_text() == bpe_file.read_text()


def test_spelled_out_end_tokens_are_text(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    text = f"a{END_OF_TEXT}b"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eod]) == END_OF_TEXT


@pytest.mark.parametrize("eos", ["Füße", {"content": "Füße"}], ids=["string", "record"])
def test_hugging_face_folder(bpe_file: Path, tmp_path: Path, eos: object) -> None:
    """Its tokenizer_config.json names the end token; its truncation and padding are not ours."""
    saved = json.loads(bpe_file.read_text())
    token = {"id": 7, "content": "Füße", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    saved["added_tokens"].append(token)
    saved["model"]["vocab"]["Füße"] = saved["model"]["vocab"].pop(
        next(name for name, number in saved["model"]["vocab"].items() if number == 7)
    )
    saved["truncation"] = dict(max_length=4, direction="Right", strategy="LongestFirst", stride=0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eod == 7
    assert len(tokenizer.encode("def f(x): return x + 1")) > 4


def test_transformers_folder(tmp_path: Path) -> None:
    """A folder of an older layout, without tokenizer.json, is read by transformers."""
    transformers = pytest.importorskip("transformers")
    vocabulary = {END_OF_TEXT: 0, "a": 1, "b": 2, "ab": 3, "<": 4, "|": 5, ">": 6}
    vocabulary |= {letter: 7 + i for i, letter in enumerate("endoftx")}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert hasattr(transformers, "AutoTokenizer")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eod == 0
    assert tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.encode("abab").tolist() == [3, 3]
    assert 0 not in tokenizer.encode(f"ab{END_OF_TEXT}ab")
    assert tokenizer.decode([3, 1]) == "aba"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bite", "unknown tokenizer 'bite'; give byte"),
        ("no/such/folder", "no/such/folder does not exist"),
        ("absent.json", "absent.json does not exist"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(UserError, match="data.tokenizer: ") as caught:
        load_tokenizer(name)
    assert says in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_no_end_token(bpe_file: Path, tmp_path: Path) -> None:
    saved = bpe_file.read_text().replace(END_OF_TEXT, "<|start|>")
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(str(tmp_path))


def test_vocabulary_too_small_for_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size: 256 is too small"):
        train_bpe(["stdlib"], 256, tmp_path)
