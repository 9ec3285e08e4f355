"""A dataset knows its files: other sizes are seen when it is opened, other bytes when it is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4pretrain.cli import main
from fp4pretrain.data import prepare_text, read_index, verify
from fp4pretrain.data.records import Reading
from fp4pretrain.errors import UserError

MakeDataset = Callable[..., str]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A dataset of four files."""
    records = [{"text": f"answer {i}", "prompt": "?" * i} for i in range(5)]
    source = tmp_path / "asked.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))
    made = str(tmp_path / "asked")
    prepare_text([source], made, reading=Reading(prompt_key="prompt"))
    return made


def test_what_was_written_is_whole(prefix: str, make_dataset: MakeDataset) -> None:
    assert verify(prefix).endswith(
        "5 documents, 55 tokens; 3 files have the content that was written"
    )
    assert verify(make_dataset()).endswith("; 2 files have the content that was written")


@pytest.mark.parametrize("suffix", [".bin", ".prompts"])
@pytest.mark.parametrize("at", [0, -1])
def test_one_other_byte_is_found_in_one_line(
    prefix: str, suffix: str, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(prefix + suffix)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    read_index(prefix)
    with pytest.raises(SystemExit, match="2"):
        main(["data", "verify", prefix])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"{prefix}{suffix} is damaged" in said[0]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".prompts"])
@pytest.mark.parametrize("damage", ["longer", "shorter", "missing"])
def test_other_sizes_are_seen_when_it_is_opened(prefix: str, suffix: str, damage: str) -> None:
    file = Path(prefix + suffix)
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data + b"\0\0\0\0" if damage == "longer" else data[:-4])
    with pytest.raises(UserError, match=rf"^data\.path: .*{suffix} .*(again|wrote)$"):
        read_index(prefix)


@pytest.mark.parametrize(
    "files", [[], {".bin": 3}, {".bin": {"bytes": "x", "sha256": "y"}}, {"/x": {}}]
)
def test_a_manifest_that_is_none_is_refused(prefix: str, files: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    with pytest.raises(UserError, match=r"^data\.path: the files in .*\.json are damaged"):
        read_index(prefix)


def test_without_a_manifest_sizes_are_all_there_is(make_dataset: MakeDataset) -> None:
    made = make_dataset()
    Path(f"{made}.json").unlink()
    assert verify(made).endswith("; sizes fit its index, and no manifest says what its content was")


def test_a_replaced_dataset_leaves_no_prompts(prefix: str, tmp_path: Path) -> None:
    prepare_text([tmp_path / "asked.jsonl"], prefix, force=True)
    assert read_index(prefix).prompts is None
    assert not Path(f"{prefix}.prompts").exists()
