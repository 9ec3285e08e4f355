"""Laws of the inputs: nothing lost, nothing reordered by chance, and one line for a bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4pretrain.data.records import cut
from fp4pretrain.data.text import list_files, read_documents
from fp4pretrain.errors import UserError


def texts(*inputs: str | Path) -> list[str]:
    return list(read_documents(list_files(inputs)))


@given(st.text(alphabet="ab\n"), st.integers(1, 10), st.integers(1, 7))
def test_cut_loses_nothing(text: str, limit: int, read: int) -> None:
    pieces = list(cut(iter([text]), limit))
    assert pieces == list(cut((text[i : i + read] for i in range(0, len(text), read)), limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)
    for piece in pieces[:-1]:  # cut inside a line only where a line does not fit
        assert piece.endswith("\n") or "\n" not in piece


def test_one_big_file_is_many_documents(tmp_path: Path) -> None:
    text = "all work and no play\n" * 10_000
    (tmp_path / "big.txt").write_text(text)
    found = texts(tmp_path / "big.txt")
    assert len(found) == 4
    assert "".join(found) == text


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    records = ["one", "two\nlines", "", "separator \u2028 inside", "half a pair \ud83d"]
    lines = [json.dumps({"text": text}, ensure_ascii="\ud83d" in text) for text in records]
    file.write_text("\n".join([*lines, "", '{"text": "last", "id": 3}']))
    expected = ["one", "two\nlines", "separator \u2028 inside", "half a pair ?", "last"]
    assert texts(file) == expected


@pytest.mark.parametrize("line", ["{", '{"txt": "x"}', '{"text": 3}', '["text"]', "null"])
def test_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n' + line)
    with pytest.raises(UserError, match=r"bad.jsonl line 2 (is not|has no) "):
        texts(tmp_path / "bad.jsonl")


def test_folder_order_is_of_names_alone(tmp_path: Path) -> None:
    """Neither the file system's order nor the folder's own place decides."""
    names = [f"{letter}/{number}.txt" for letter in "abc" for number in range(5)]
    for folder, order in (("one", names), ("two", names[::-1])):
        for name in order:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(name)
    found = texts(tmp_path / "one")
    assert found == texts(tmp_path / "two")
    assert sorted(found) == names
    assert found != names


def test_folder_skips_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("kept")
    (tmp_path / "b.bin").write_text("other suffix")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    assert texts(tmp_path) == ["kept"]


def test_named_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match="not UTF-8"):
        texts(tmp_path / "c.txt")


@pytest.mark.parametrize(("name", "says"), [("absent", "does not exist"), ("", "no text in")])
def test_nothing_to_read(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(UserError, match=f"inputs: .*{says}"):
        list_files([tmp_path / name])


def test_stdlib_is_this_pythons_source() -> None:
    files = {file.name: file for file in list_files(["stdlib"])}
    assert files["json/__init__.py"].path.samefile(json.__file__)
    assert sum(file.size for file in files.values()) > 5_000_000
    assert not any("site-packages" in name for name in files)
    assert all(name.endswith(".py") for name in files)
