"""Laws of the files: written whole or not at all, equal to Megatron's, and damage has one line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from fp4pretrain.data.ids import scan
from fp4pretrain.data.indexed import read_index, write_dataset
from fp4pretrain.data.tokenizers import ByteTokenizer
from fp4pretrain.errors import UserError

MakeDataset = Callable[..., str]
BYTE = ByteTokenizer()


@settings(deadline=None)  # files on a busy machine
@given(st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=9))
def test_megatron_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    prefix = str(tmp_path_factory.mktemp("law") / "some")
    arrays = [np.array(ids, dtype=np.int64) for ids in documents]
    index = write_dataset(arrays, prefix, tokenizer=BYTE, source="a test")
    theirs = IndexedDataset(prefix)
    expected = [[*ids, BYTE.eod] for ids in documents]
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected
    assert index.lengths().tolist() == [len(ids) for ids in expected]
    assert index.tokens == sum(len(ids) for ids in expected)
    for i, ids in enumerate(expected):
        assert index.read(index.offset(i), index.offset(i + 1)).tolist() == ids
    assert scan(index).largest == BYTE.eod
    assert index.dtype == theirs.index.dtype


def test_largest_id_of_a_foreign_dataset(make_dataset: MakeDataset) -> None:
    """Megatron's own tools leave no PREFIX.json: then the tokens themselves are read."""
    prefix = make_dataset()
    Path(f"{prefix}.json").unlink()
    index = read_index(prefix)
    assert index.meta == {}
    assert scan(index).largest == BYTE.eod


def test_what_killed_builders_left_goes_and_builders_at_work_stay(tmp_path: Path) -> None:
    two_days = 2 * 24 * 3600
    for name in ("old", "at-work"):
        folder = tmp_path / f".building-{name}"
        folder.mkdir()
        (folder / "some.bin").write_bytes(b"tokens")
        for path in (folder / "some.bin", folder):
            os.utime(path, (time.time() - two_days,) * 2)
    os.utime(tmp_path / ".building-at-work/some.bin")  # grows, in a folder made long ago
    write_dataset([np.zeros(3, dtype=np.int64)], str(tmp_path / "new"), tokenizer=BYTE, source="")
    assert {path.name for path in tmp_path.glob(".building-*")} == {".building-at-work"}


def test_failing_midway_leaves_the_old_dataset(make_dataset: MakeDataset) -> None:
    prefix = make_dataset()
    folder = Path(prefix).parent
    before = {file: file.read_bytes() for file in folder.iterdir()}

    def documents() -> Iterator[NDArray[np.int64]]:
        yield np.zeros(5, dtype=np.int64)
        raise RuntimeError("the disk of the source broke")

    with pytest.raises(RuntimeError):
        write_dataset(documents(), prefix, tokenizer=BYTE, source="a test")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document"):
        write_dataset([], str(tmp_path / "none"), tokenizer=BYTE, source="a test")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="out_prefix: cannot write in .*file"):
        write_dataset([], str(tmp_path / "file" / "x"), tokenizer=BYTE, source="a test")


def cut_to(size: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def replace_byte(at: int, value: int) -> Callable[[Path], object]:
    def damage(file: Path) -> None:
        raw = bytearray(file.read_bytes())
        raw[at] = value
        file.write_bytes(raw)

    return damage


@pytest.mark.parametrize(
    ("suffix", "damage", "says"),
    [
        (".bin", Path.unlink, r"data\.bin is missing; give a prefix"),
        (".idx", Path.unlink, r"data\.idx is missing; give a prefix"),
        (".bin", cut_to(4098), r"has 4,098 bytes where its index says 4,100"),
        (".bin", lambda file: file.write_bytes(file.read_bytes() + b"x"), "has 4,101 bytes"),
        (".bin", cut_to(0), r"has 0 bytes"),
        (".idx", lambda file: file.write_text("text,label\n" * 9), "not a Megatron indexed"),
        (".idx", cut_to(0), "not a Megatron indexed"),
        (".idx", cut_to(20), "not a Megatron indexed"),
        (".idx", cut_to(300), "cut short"),
        (".idx", replace_byte(9, 2), "version 2, token type 8"),
        (".idx", replace_byte(17, 7), "version 1, token type 7"),
        # 50 lengths (int32) from byte 34 on, 50 pointers (int64) from 234, 51 marks from 634
        (
            ".idx",
            replace_byte(34 + 4 * 25 + 3, 0x80),
            r"damaged \(document 25 has -2,147,483,607 tok",
        ),
        (".idx", replace_byte(34 + 4 * 25, 7), r"damaged \(document 26 is out of place\)"),
        (".idx", replace_byte(234 + 8 * 10 + 7, 0x7F), r"damaged \(document 10 is out of place\)"),
        (".idx", replace_byte(634 + 8 * 3 + 2, 1), r"damaged \(its documents go back\)"),
        (".json", lambda file: file.write_text("{"), "give your own file another name"),
    ],
)
def test_damage_has_one_line(
    make_dataset: MakeDataset, suffix: str, damage: Callable[[Path], object], says: str
) -> None:
    prefix = make_dataset()
    damage(Path(prefix + suffix))
    with pytest.raises(UserError, match=f"^data.path: .*{says}") as caught:
        read_index(prefix)
    assert "\n" not in str(caught.value)


def test_meta_says_who_tokenized(make_dataset: MakeDataset) -> None:
    meta = json.loads(Path(make_dataset() + ".json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eod"]) == ("byte", 257, 256)
