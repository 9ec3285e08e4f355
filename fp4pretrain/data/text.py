"""Where documents come from: files, folders, and Python's own standard library.

An input is a path or the word ``stdlib``. ``records`` reads what is in a file. Every machine has
Python's standard library (source and docstrings, tens of MB): it is the corpus of a run that names none.

A folder's files come in the order of a hash of their relative path: always the same, and its tail is
a fair sample of the whole, where an alphabetical tail would be all xml and zipfile. (megatron-core's
validation set is the LAST documents. For its sake too, text is cut into documents of 64 Ki characters:
one big file can be split at all, and a few huge tables do not fill the validation set.)
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fp4pretrain.data.columns import TABLES, is_dataset_file
from fp4pretrain.data.records import Document, Reading, documents_of, kind_of, open_file
from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path

STDLIB = "stdlib"
# What a folder contributes, compressed or not. A file named by itself is read whatever its suffix;
# .json files are read only when named: in a folder they are as often settings as text.
TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".tex", ".jsonl", ".ndjson", ".py", ".c", ".h", ".cpp", *TABLES}
)
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
        UserError: an input that does not exist or cannot be read, or no text in any of them.
    """
    files: list[TextFile] = []
    for given in inputs:
        try:
            files += _files_of(given)
        except OSError as error:  # a folder that may not be entered, a name that is too long
            raise UserError(
                f"inputs: {error.filename or given} cannot be read ({error.strerror}); change its "
                "permissions, or give another input"
            ) from None
    if not any(file.size for file in files):
        names = ", ".join(str(given) for given in inputs) or "nothing"
        raise UserError(
            f"inputs: no text in {names}; give files, or folders of "
            f"{' '.join(sorted(TEXT_SUFFIXES))} files (.json files one by one)"
        )
    return files


def read_documents(files: Sequence[TextFile], reading: Reading | None = None) -> Iterator[str]:
    """The texts of `read_records`, each behind its prompt."""
    for document in read_records(files, reading):
        yield document.prompt + document.text


def read_records(
    files: Sequence[TextFile],
    reading: Reading | None = None,
    *,
    watch: Callable[[BinaryIO], BinaryIO] | None = None,
) -> Iterator[Document]:
    """The non-empty documents of the files, in order, one at a time.

    Args:
        files: of `list_files`.
        reading: how records are read; it counts those passed over.
        watch: wraps each open file, to follow how far it was read.

    Raises:
        UserError: a file that cannot be read, a named one that is not UTF-8, a broken record.
    """
    reading = reading or Reading()
    for file in files:
        with open_file(file.path, file.name) as stream:
            watched = stream if watch is None else watch(stream)
            yield from documents_of(watched, file.name, reading, may_skip_file=not file.named)


def _files_of(given: str | Path) -> list[TextFile]:
    if str(given) == STDLIB:
        return _stdlib_files()
    path = user_path(given, key="inputs")
    if path.is_dir():
        return _folder_files(path, TEXT_SUFFIXES, skip=frozenset({"__pycache__"}))
    if path.is_file():
        return [TextFile(path, str(given), path.stat().st_size, named=True)]
    raise UserError(
        f"inputs: {given} does not exist; give text or .jsonl files, folders, or {STDLIB}"
    )


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

    def refuse(error: OSError) -> None:  # os.walk would leave out a folder that it cannot list
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skip]  # and do not descend
        for name in names:
            path = Path(folder, name)
            if kind_of(name) in suffixes and path.is_file() and is_dataset_file(path):
                label = path.relative_to(root).as_posix()
                found.append(TextFile(path, label, path.stat().st_size, named=False))
    return sorted(found, key=lambda file: hashlib.sha256(file.name.encode()).digest())
