"""Where documents come from: text files, JSON lines, folders, and Python's own standard library.

An input is a path or the word ``stdlib``. A ``.jsonl`` file holds one document a line, in its
``text``; any other file is text. Every machine has Python's standard library (source and
docstrings, tens of MB): it is the corpus of a run that names none.

Two choices serve the split, which gives megatron-core's validation set the LAST documents:
- A folder's files come in the order of a hash of their relative path: always the same, and its
  tail is a fair sample of the whole, where an alphabetical tail would be all xml and zipfile.
- Text is cut at line breaks into documents of 64 Ki characters, so that one big file can be split
  at all, and a few huge tables do not fill the validation set.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4pretrain.errors import UserError

STDLIB = "stdlib"
DOCUMENT_CHARACTERS = 1 << 16
# What a folder contributes. A file named by itself is read whatever its suffix.
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".tex", ".jsonl", ".py", ".c", ".h", ".cpp"})
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class TextFile:
    """One file to read: its path, its name for messages and ordering, its size in bytes."""

    path: Path
    name: str
    size: int
    named: bool  # by the user, one by one: then text that is not UTF-8 is an error, not skipped


def list_files(inputs: Sequence[str | Path]) -> list[TextFile]:
    """Every file behind `inputs`, in the order in which its documents are written.

    Raises:
        UserError: an input that does not exist, or no text in any of them.
    """
    files: list[TextFile] = []
    for given in inputs:
        path = Path(given).expanduser()
        if str(given) == STDLIB:
            files += _stdlib_files()
        elif path.is_dir():
            files += _folder_files(path, TEXT_SUFFIXES, skip=frozenset({"__pycache__"}))
        elif path.is_file():
            files.append(TextFile(path, str(given), path.stat().st_size, named=True))
        else:
            raise UserError(
                f"inputs: {given} does not exist; give text or .jsonl files, folders, or {STDLIB}"
            )
    if not any(file.size for file in files):
        names = ", ".join(str(given) for given in inputs) or "nothing"
        raise UserError(
            f"inputs: no text in {names}; give files, or folders of "
            f"{' '.join(sorted(TEXT_SUFFIXES))} files"
        )
    return files


def read_documents(files: Sequence[TextFile]) -> Iterator[tuple[TextFile, list[str]]]:
    """Each file with its non-empty documents, in order.

    Raises:
        UserError: a file named by the user that is not UTF-8, or a JSON line without a text.
    """
    for file in files:
        yield file, list(_documents_of(file))


def _documents_of(file: TextFile) -> Iterator[str]:
    try:
        text = file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        if file.named:
            raise UserError(f"inputs: {file.name} is not UTF-8 text; convert it first") from None
        return
    if file.path.suffix == ".jsonl":
        yield from _json_lines(text, file.name)
    else:
        yield from cut(text, DOCUMENT_CHARACTERS)


def _json_lines(text: str, name: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            raise UserError(
                f'inputs: {name} line {number} is not a JSON object with a string "text"; '
                "write one such object a line"
            )
        if document:
            # JSON can spell half a surrogate pair, which no UTF-8 holds: "?" in its place.
            yield document.encode(errors="replace").decode()


def cut(text: str, limit: int) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, each ending at a line break if it has one."""
    begin = 0
    while begin < len(text):
        end = min(begin + limit, len(text))
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _stdlib_files() -> list[TextFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _folder_files(root, frozenset({".py"}), skip=_NOT_STDLIB)
    if not files:
        raise UserError(
            f"data.path: this Python keeps no standard library source in {root}; build a dataset "
            "with `fp4pretrain data build` and give its prefix"
        )
    return files


def _folder_files(root: Path, suffixes: frozenset[str], *, skip: frozenset[str]) -> list[TextFile]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]  # and do not descend
        for name in names:
            path = Path(folder, name)
            if path.suffix in suffixes and path.is_file():
                label = path.relative_to(root).as_posix()
                found.append(TextFile(path, label, path.stat().st_size, named=False))
    return sorted(found, key=lambda file: hashlib.sha256(file.name.encode()).digest())
