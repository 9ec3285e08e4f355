"""Files are UTF-8 and written whole: the helper's laws, and that nothing in the package goes around it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp4pretrain.files import replacing, user_path, write_text

ROOT = Path(__file__).resolve().parents[3]
# Who opens files to write by itself, and why that is whole too.
WRITERS = {
    "fp4pretrain/files.py",  # the helper
    "fp4pretrain/data/indexed.py",  # in a folder aside, renamed at the end
    "fp4pretrain/data/corpus.py",  # in a folder aside, renamed at the end; a lock, which is empty
    "fp4pretrain/data/corpus_work.py",  # beside, renamed when complete
    "fp4pretrain/observe/jsonl.py",  # appends whole lines
    "fp4pretrain/sweep/starting.py",  # appends what a run's processes print
    "fp4pretrain/train/checkpoint/files.py",  # in a folder aside, synced and renamed at the end
    "fp4pretrain/train/hooks/watchdog.py",  # appends stacks of a process that may be dying
}


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a pair \ud83d")
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_replaced_keeps_its_permissions_and_new_files_have_the_umasks(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    old = os.umask(0o027)
    try:
        write_text(path, "±\r\n")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        write_text(path, "±\r\n")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o604
    assert path.read_bytes() == "±\r\n".encode()


def _opens(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, mode, whether an encoding is named) of everything that opens a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = {word.arg: word.value for word in node.keywords}
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if ast.unparse(node.func) == "os.open":
            continue  # a descriptor, of a folder
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            yield node.lineno, name[0], "encoding" in named
        elif name == "write_bytes":
            yield node.lineno, "wb", True
        elif name in ("open", "fdopen", "NamedTemporaryFile"):
            modes = [*node.args, *named.values()]
            texts = [m.value for m in modes if isinstance(m, ast.Constant)]
            mode = next((m for m in texts if isinstance(m, str) and set(m) <= set("rwabtx+")), "r")
            yield node.lineno, mode, "encoding" in named or "b" in mode


def test_every_text_file_names_utf8_and_is_written_by_the_helper() -> None:
    """Ruff's PLW1514 sees open() alone, not the methods of a path."""
    wrong = []
    for path in [*ROOT.glob("fp4pretrain/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        name = str(path.relative_to(ROOT))
        for line, mode, encoded in _opens(ast.parse(path.read_text(encoding="utf-8"))):
            if not encoded:
                wrong.append(f"{name}:{line} names no encoding")
            if set(mode) & set("wax") and name not in WRITERS:
                wrong.append(f"{name}:{line} writes beside fp4pretrain.files")
    assert wrong == []


def test_a_latin_locale_changes_no_file(tmp_path: Path) -> None:
    """As a process whose own encoding is Latin-1: reads and writes UTF-8, and prints what it can."""
    (tmp_path / "a.txt").write_text("naïve façade, 東京 ± \n" * 50, encoding="utf-8")
    arguments = ["train-bpe", "a.txt", "--vocab-size", "270", "--out", "bpe.json"]
    made = []
    for encoding in ("utf-8", "iso-8859-1"):
        code = (
            "import sys, _locale, locale\n"
            f"locale.getpreferredencoding = lambda *_: {encoding!r}\n"
            f"import io; io.text_encoding = lambda e, *_: e or {encoding!r}\n"
            "from fp4pretrain.cli import main\n"
            "main(['data', *sys.argv[1:]])\n"
        )
        for command in (
            arguments,
            ["build", "a.txt", "--out", encoding, "--tokenizer", "bpe.json"],
        ):
            done = subprocess.run(
                [sys.executable, "-c", code, *command],
                cwd=tmp_path,
                env=os.environ
                | {"PYTHONIOENCODING": encoding, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        made.append([(tmp_path / n).read_bytes() for n in ("bpe.json", f"{encoding}.bin")])
    assert made[0] == made[1]


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/x", key="out") == Path("/somewhere/x")
