"""What validate() refuses, each with the key and the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp4pretrain.data.spec import DataSpec, parse_split, parts_of, validate
from fp4pretrain.errors import UserError

MakeDataset = Callable[..., str]


@pytest.fixture
def spec(make_dataset: MakeDataset, tmp_path: Path) -> DataSpec:
    """Valid: 50 documents of 41 tokens, 40 of them for training, and 10 for validation."""
    cache = str(tmp_path / "cache")
    return DataSpec(path=make_dataset(), split="0.8,0.2", seq_length=64, cache_dir=cache)


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("0.98,0.02,0", (0.98, 0.02, 0)),
        ("98,2", (0.98, 0.02, 0)),
        (" 8, 1, 1 ", (0.8, 0.1, 0.1)),
        ("1,0,0", (1, 0, 0)),
    ],
)
def test_split_shares(split: str, shares: tuple[float, float, float]) -> None:
    assert parse_split(split) == pytest.approx(shares)


@pytest.mark.parametrize("split", ["", "1", "a,b", "1,-1,0", "1,2,3,4", "nan,1,0", "inf,1,0"])
def test_split_that_does_not_parse(split: str) -> None:
    with pytest.raises(UserError, match="data.split: .* is not two or three shares"):
        parse_split(split)


def test_split_without_training() -> None:
    with pytest.raises(UserError, match="data.split: '0,1,0' leaves no training data"):
        parse_split("0,1,0")


def test_valid_specs(spec: DataSpec) -> None:
    validate(spec)
    validate(replace(spec, split="1,0,0", valid=spec.path))
    validate(replace(spec, valid={"a": spec.path, "b": spec.path}, valid_tokens=None))
    validate(replace(spec, path=None))
    validate(DataSpec(mock=True))
    validate(replace(spec, vocab_size=257))


def test_blend_weights_are_shares(spec: DataSpec) -> None:
    blend = {"a": {"prefix": "x", "weight": 3}, "b": {"prefix": "y"}}
    parts = parts_of(replace(spec, path=blend))
    assert [(part.key, part.prefix, part.weight) for part in parts] == [
        ("data.path.a", "x", 0.75),
        ("data.path.b", "y", 0.25),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "nowhere"}, "data.path: nowhere.idx is missing"),
        ({"path": {}}, "data.path: the blend is empty"),
        ({"path": {"web": "x"}}, "data.path.web: needs a prefix"),
        ({"path": {"web": {"weight": 1}}}, "data.path.web: needs a prefix"),
        (
            {"path": {"web": {"prefix": "x", "max_epoch": 1}}},
            "data.path.web.max_epoch: no such key",
        ),
        ({"path": {"web": {"prefix": "x", "weight": 0}}}, "data.path.web.weight: 0 is not above 0"),
        ({"path": {"web": {"prefix": "x", "weight": -1}}}, "data.path.web.weight: -1 is not above"),
        ({"path": {"web": {"prefix": "x", "weight": "3"}}}, "data.path.web.weight: 3 is not above"),
        ({"path": {"web": {"prefix": "x"}}}, "data.path.web: x.idx is missing"),
        ({"split": "99.9,0.1"}, "data.split: .* leaves no validation data of the 50 documents"),
        ({"split": "nonsense"}, "data.split: 'nonsense' is not"),
        ({"split": "1,0,0"}, "data.split: .* leaves no validation data .* as data.valid"),
        ({"valid": "nowhere"}, "data.valid: nowhere.idx is missing"),
        ({"valid": {}}, "data.valid: it names no dataset"),
        ({"valid": {"a": 3}}, "data.valid.a: needs a prefix"),
        ({"valid": {"a": "nowhere"}}, "data.valid.a: nowhere.idx is missing"),
        ({"seq_length": 2050}, "data.path: 2,050 tokens .* too few for one sample of 2,050"),
        ({"seq_length": 0}, "model.seq_length: 0 is not positive"),
        ({"vocab_size": 256}, "model.vocab_size: 256 is below the 257 ids of tokenizer byte"),
        ({"tokenizer": "bite"}, "data.tokenizer: unknown tokenizer 'bite'"),
    ],
    ids=str,
)
def test_refusals(spec: DataSpec, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}") as caught:
        validate(replace(spec, **change))
    assert "\n" not in str(caught.value)


def test_foreign_tokenizer(spec: DataSpec) -> None:
    file = Path(f"{spec.path}.json")
    meta = json.loads(file.read_text()) | {"tokenizer": "my/bpe", "tokenizer_fingerprint": "f00"}
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="byte is not what .* set data.tokenizer=my/bpe"):
        validate(spec)


def test_ids_beyond_the_vocabulary_of_a_foreign_dataset(spec: DataSpec) -> None:
    """Without PREFIX.json nobody knows the tokenizer, but the ids speak."""
    Path(f"{spec.path}.json").unlink()
    raw = bytearray(Path(f"{spec.path}.bin").read_bytes())
    raw[100:102] = (999).to_bytes(2, "little")
    Path(f"{spec.path}.bin").write_bytes(raw)
    validate(replace(spec, vocab_size=1000))
    with pytest.raises(UserError, match="model.vocab_size: 999 leaves out token id 999"):
        validate(replace(spec, vocab_size=999))


def test_cache_that_cannot_be_written(spec: DataSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="data.cache_dir: cannot write in .*file"):
        validate(replace(spec, cache_dir=str(tmp_path / "file")))


def test_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataSpec().cache == tmp_path / "fp4pretrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataSpec().cache == Path.home() / ".cache" / "fp4pretrain"
