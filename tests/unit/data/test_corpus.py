"""`data corpus`: what stays and what is left out, the same dataset however it was built, restarts."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fp4pretrain import cli
from fp4pretrain.data import corpus, corpus_files
from fp4pretrain.data.corpus import build_corpus
from fp4pretrain.data.corpus_files import list_pieces, read_piece, strip_markup, why_not
from fp4pretrain.data.indexed import write_dataset, write_index
from fp4pretrain.data.tokenizers import ByteTokenizer, load_tokenizer
from fp4pretrain.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SUFFIXES = (".bin", ".idx", ".tokenizer.json")


def prose(seed: int, words: int = 80) -> str:
    draw = random.Random(seed)
    letters = "etaoinshrdlu"
    made = ("".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(words))
    return f"Story {seed}. {' '.join(made)}.\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for i in range(12):
        (folder / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part{i % 3}" / f"story{i}.txt").write_text(prose(i))
    (folder / "again.txt").write_text(prose(3))
    (folder / "header").write_text(prose(20))  # no suffix
    (folder / "page.html").write_text(
        f"<html><head><title>x</title></head><p>{prose(21)}</p></html>"
    )
    (folder / "packed.gz").write_bytes(gzip.compress(prose(22).encode()))
    (folder / "lines.jsonl").write_text(json.dumps({"text": prose(23)}) + "\n")
    (folder / "program").write_bytes(b"\x7fELF\0\0" + prose(24).encode())
    (folder / "lib.so").write_bytes(b"\0" * 100)
    (folder / "latin.txt").write_bytes(("\xe9" + prose(25)).encode("latin-1"))
    (folder / "table.csv").write_text("a,b\n" * 50)
    (folder / "script.js").write_text("var a='" + prose(26, 2000).replace("\n", " ") + "'")
    return folder


@pytest.fixture(autouse=True)
def _many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_GROUP_BYTES", 2000)


def build(out: Path, source: Path, **options: object) -> corpus.Corpus:
    return build_corpus(out, [str(source)], **{"vocab_size": 300, "workers": 2, **options})


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def test_every_text_once_and_a_reason_for_the_rest(source: Path, tmp_path: Path) -> None:
    made = build(tmp_path / "out" / "text", source)
    tokenizer = load_tokenizer(str(made.tokenizer))
    index = made.index
    found = []
    for i in range(index.documents):
        ids = index.read(index.offset(i), index.offset(i + 1)).tolist()
        assert ids[-1] == tokenizer.eod
        found.append(tokenizer.decode(ids[:-1]))
    assert sorted(one.strip() for one in found) == sorted(
        prose(i).strip() for i in (*range(12), 20, 21, 22, 23)
    )
    assert {reason: files for reason, (files, _) in made.left_out.items()} == {
        "binary": 2,
        "not UTF-8": 1,
        "data files": 1,
        "very long lines": 1,
        "duplicates": 1,
    }
    assert made.text_bytes == sum(len(one.encode()) for one in found)
    assert index.meta["largest_id"] == index.read(0, index.tokens).max()
    assert index.meta["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert not Path(f"{index.prefix}.building").exists()


def test_workers_and_place_do_not_matter(source: Path, tmp_path: Path) -> None:
    build(tmp_path / "one", source, workers=1)
    moved = source.rename(tmp_path / "moved")
    build(tmp_path / "three", moved, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.parametrize("stage", ["_train", "_join"])
def test_a_failed_build_goes_on_from_where_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    build(tmp_path / "whole", source)
    prefix = tmp_path / "text"
    with monkeypatch.context() as broken:
        broken.setattr(corpus, stage, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(prefix, source)
    folder = Path(f"{prefix}.building")
    left = {path for path in folder.iterdir() if path.name[:4] in ("text", "ids-", "toke")}
    (folder / "text-00001.npz").unlink()
    if stage == "_join":
        (folder / "ids-00002.npy").unlink()
    done: list[int] = []
    everything = corpus._all
    with monkeypatch.context() as watched:
        watched.setattr(
            corpus,
            "_all",
            lambda pool, work, tasks, **names: (
                done.append(len(tasks)),
                everything(pool, work, tasks, **names),
            ),
        )
        build(prefix, source)
    groups = len([path for path in left if path.suffix == ".npz"])
    assert groups > 3
    assert done == ([1, groups] if stage == "_train" else [1, 1])
    assert contents(prefix) == contents(tmp_path / "whole")


def test_another_state_of_the_files_starts_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(corpus, "_join", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(tmp_path / "text", source)
    (source / "new.txt").write_text(prose(50))
    build(tmp_path / "text", source)
    build(tmp_path / "fresh", source)
    assert contents(tmp_path / "text") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_a_killed_build_leaves_no_worker_and_goes_on(source: Path, tmp_path: Path) -> None:
    script = f"""
import os, signal
from fp4pretrain.data import corpus
if __name__ == "__main__":
    corpus._GROUP_BYTES = 2000
    def die(pool, work, tasks, **names):
        everything(pool, work, tasks, **names)
        print(*pool._processes, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    everything, corpus._all = corpus._all, die
    corpus.build_corpus({str(tmp_path / "text")!r}, [{str(source)!r}], vocab_size=300, workers=2)
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    program = tmp_path / "program.py"
    program.write_text(script)
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    workers = [Path("/proc", pid) for pid in done.stdout.split()]
    assert workers
    until = time.monotonic() + 30
    while any(worker.exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(worker.exists() for worker in workers)
    build(tmp_path / "text", source)
    build(tmp_path / "fresh", source)
    assert contents(tmp_path / "text") == contents(tmp_path / "fresh")


def test_a_corpus_does_not_read_itself(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "text.txt").write_text(prose(60))  # of the same stem, and not its own
    made = build(source / "text", source)
    first = contents(source / "text")
    monkeypatch.chdir(source)
    again = build(Path("text"), Path("."), force=True)
    assert contents(source / "text") == first
    assert again.left_out == made.left_out


def test_refusals_are_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.json").write_text("mine")
    (tmp_path / "file").write_text("")
    cases = {
        "notes.json exists": [str(source), "--out", str(tmp_path / "notes")],
        "no_such_source is no file": ["no_such_source", "--out", str(tmp_path / "a")],
        "no text": [str(empty), "--out", str(tmp_path / "b")],
        "--vocab-size: 256": [str(source), "--vocab-size", "256", "--out", str(tmp_path / "c")],
        "--workers: 0": [str(source), "--workers", "0", "--out", str(tmp_path / "d")],
        "cannot write": [str(source), "--out", str(tmp_path / "file" / "e")],
    }
    for said, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main(["data", "corpus", *arguments])
        assert stopped.value.code == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    assert (tmp_path / "notes.json").read_text() == "mine"


def test_an_output_is_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "text"
    build(prefix, source)
    (source / "new.txt").write_text(prose(50))
    with pytest.raises(UserError, match="--force"):
        build(prefix, source)
    before = build(tmp_path / "other", source)
    assert build(prefix, source, force=True).index.documents == before.index.documents


def test_two_builds_do_not_share_a_folder(source: Path, tmp_path: Path) -> None:
    with (
        corpus._alone(tmp_path / "text.building"),
        pytest.raises(UserError, match="another process"),
    ):
        build(tmp_path / "text", source)


def test_pieces_of_a_large_file_are_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is in exactly one piece, whatever the size of a piece."""
    file = tmp_path / "large.txt"
    text = "".join(prose(i, 30 + i % 7) for i in range(60))
    file.write_text(text)
    for size in (97, 1000, 4096, len(text)):
        monkeypatch.setattr(corpus_files, "PIECE_BYTES", size)
        monkeypatch.setattr(corpus_files, "_SHORT", 0)
        pieces, _ = list_pieces([str(file)])
        parts = [b"".join(read_piece(piece)[0]) for piece in pieces]
        assert len(parts) == -(-len(text) // size)
        assert b"".join(parts).decode() == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("".join(map(prose, range(20))), None),
        (prose(1, 2000), "very long lines"),
        ("def f(x):\n    return x + 1  # one more\n\n" + prose(2), None),
        ("При этом текст не по-английски. " * 3 + "Ещё одно предложение.\n", None),
        ("这是一个用来测试的句子，它没有空格，但是它是自然语言。\n" * 2, None),
        ("short\n", "nearly empty"),
        ("1.25, 3.75, 8.5\n" * 20, "mostly digits"),
        ("----------------\n" * 20, "few letters"),
        ("aaaaaaaaaa b\n" * 20, "mostly one character"),
        ("{" + "key: value, " * 600 + "}\n", "very long lines"),
        ("text \x01\x02 of a terminal\n" * 9, "control characters"),
        (base64.encodebytes(random.Random(1).randbytes(9000)).decode(), "encoded data"),
        ("the same line of a generated table, again\n" * 500, "repetitive"),
    ],
)
def test_what_is_text(text: str, reason: str | None) -> None:
    assert why_not(text.encode(), lines=True) == reason


def test_markup_is_stripped() -> None:
    page = (
        "<!DOCTYPE html><html><head><title>t</title><style>p {}</style></head><body>"
        "<script>if (a < b) { c() }</script><!-- not <b>seen</b> -->"
        "<h1>Sums</h1><p>If a &lt; b &amp;&amp; b &lt; c, <em>then</em> a &lt; c.</p></body></html>"
    )
    assert strip_markup(page).split("\n") == ["Sums", "", "If a < b && b < c, then a < c.", ""]


def test_sources_are_packages_too() -> None:
    """An importable package is its folder; names order files, not where they lie."""
    pieces, _ = list_pieces(["rich"])
    names = {piece.name for piece in pieces}
    assert "console.py" in names and not any("__pycache__" in name for name in names)


def test_an_index_is_megatrons(tmp_path: Path) -> None:
    lengths = [3, 1, 7, 200]
    documents = (np.arange(length - 1) for length in lengths)
    write_dataset(documents, str(tmp_path / "a"), tokenizer=ByteTokenizer(), source="a test")
    write_index(tmp_path / "b.idx", np.array(lengths), dtype=np.dtype(np.uint16))
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
