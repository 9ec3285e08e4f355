"""What `fp4pretrain data corpus` reads: the files behind its sources, and the text in each.

A source is ``packages`` (what pip installed for this Python), ``stdlib``, ``system`` (Debian's
documentation, headers and sources), a file or folder, an importable package, or a Debian package.

Files are judged by content, since much of a machine's text has no suffix (C++ headers) or a gzip's.
Markup is stripped. Left out, each with its reason: what is not UTF-8 text, data tables, encoded data
and generated code. The limits stand beside their rules. They are meant to keep all prose and
hand-written code, and are loose: text that is a little dull does no harm to a comparison of recipes.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import json
import os
import re
import site
import stat
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fp4pretrain.data.records import DOCUMENT_CHARACTERS, cut
from fp4pretrain.errors import UserError

PACKAGES, STDLIB, SYSTEM = "packages", "stdlib", "system"
DEFAULT_SOURCES = (PACKAGES, STDLIB, SYSTEM)
_SYSTEM_FOLDERS = ("/usr/share/doc", "/usr/src", "/usr/include", "/usr/share/perl")
_DPKG = Path("/var/lib/dpkg/info")  # NAME.list or NAME:ARCH.list: one installed path a line
_SITE = frozenset({"site-packages", "dist-packages"})
_SKIPPED_FOLDERS = frozenset({"__pycache__", ".git", "node_modules"})

PIECE_BYTES = 4 << 20  # a larger file is read in pieces of this size, cut at line breaks
_WHOLE_BYTES = 16 << 20  # what is unpacked or stripped of markup must be read whole
_LINE_BYTES = 1 << 20  # no longer line is followed past the end of a piece
_SNIFFED = 8192
_SHORT = 64  # bytes: an empty __init__.py, a one-line marker

# Never opened. Whatever is not listed is opened and judged.
_BINARY = frozenset(
    ".a .bc .bmp .bz2 .class .dat .deb .dll .dylib .egg .eot .exe .gif .ico .jar .jpeg .jpg .lib "
    ".mo .mp3 .mp4 .npy .npz .o .obj .onnx .otf .parquet .pdf .pickle .pkl .png .pt .pth .pyc .pyd "
    ".safetensors .so .tar .tgz .tif .tiff .ttf .wasm .webp .whl .woff .woff2 .xz .zip .zst".split()
)
_DATA = frozenset(".csv .ipynb .json .lock .map .pem .svg .tsv .xml .xsd .xsl".split())
_HTML = frozenset({".html", ".htm", ".xhtml"})


@dataclass
class LeftOut:
    """Reasons, each with how many files and bytes it left out."""

    reasons: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, *, files: int, size: int) -> None:
        count = self.reasons.setdefault(reason, [0, 0])
        count[0] += files
        count[1] += size

    def merge(self, other: dict[str, list[int]]) -> None:
        for reason, (files, size) in other.items():
            self.add(reason, files=files, size=size)


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, end) of a file, from line break to line break.

    `name` is the path below the source: it orders files, wherever the source lies. `changed` is
    the time of the last change in nanoseconds.
    """

    path: str
    name: str
    begin: int
    end: int
    changed: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def list_pieces(sources: Sequence[str], *, skip: Sequence[str] = ()) -> tuple[list[Piece], LeftOut]:
    """The files behind `sources` in the order of a hash of their names, large ones in pieces.

    Args:
        sources: see the module; what stands in two of them is found once, by its content.
        skip: absolute files and folders that are not read (the corpus itself, built in a source).

    Raises:
        UserError: a source that does not exist.
    """
    left_out = LeftOut()
    inside = tuple(f"{path}/" for path in skip)
    found: list[tuple[bytes, int, int, Piece]] = []
    for number, source in enumerate(sources):
        for path, name in _files(source):
            if path in skip or path.startswith(inside):
                continue
            key = hashlib.blake2b(name.encode(errors="replace"), digest_size=16).digest()
            pieces = _pieces_of(path, name, left_out)
            found += [(key, number, piece.begin, piece) for piece in pieces]
    found.sort(key=lambda one: (*one[:3], one[3].name))
    return [one[3] for one in found], left_out


def read_piece(piece: Piece) -> tuple[list[bytes], str | None]:
    """The documents of `piece` as UTF-8, or none and the reason."""
    try:
        with open(piece.path, "rb") as stream:
            if b"\0" in stream.read(_SNIFFED) and not piece.name.endswith(".gz"):
                return [], "binary"
            data = _read(stream, piece)
    except (OSError, EOFError, zlib.error):
        return [], "unreadable"
    if data is None:
        return [], "too large to unpack"
    if b"\0" in data:
        return [], "binary"
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return [], "not UTF-8"
    name = piece.name.removesuffix(".gz")
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".jsonl":
        texts = _json_texts(text)
        if texts is None:
            return [], "JSON lines without a text"
        text, lines = "\n".join(texts), False
    elif suffix in _HTML or text[:200].lstrip().lower().startswith(("<!doctype html", "<html")):
        texts, lines = [strip_markup(text)], False
        text = texts[0]
    else:
        texts, lines = [text], True
    reason = why_not(text.encode(errors="replace"), lines=lines)
    if reason is not None:
        return [], reason
    documents = (part for one in texts for part in cut(iter((one,)), DOCUMENT_CHARACTERS))
    return [part.encode(errors="replace") for part in documents if part.strip()], None


def why_not(text: bytes, *, lines: bool) -> str | None:
    """Why `text` is no prose or code that somebody wrote; None where it may be.

    Args:
        text: UTF-8.
        lines: whether long lines speak against it (a document of JSON lines may be one line).
    """
    if len(text.strip()) < _SHORT:
        return "nearly empty"
    values = np.frombuffer(text, dtype=np.uint8)
    counts = np.bincount(values, minlength=256)
    visible = counts[33:].sum()
    letters = counts[65:91].sum() + counts[97:123].sum() + counts[128:].sum()
    # Code has 60 to 75% letters among what is visible, prose 95%, and at most 12% of one of them.
    if counts[:9].sum() + counts[14:32].sum() > 0.005 * len(text):
        return "control characters"
    if counts[48:58].sum() > 0.3 * visible:
        return "mostly digits"
    if letters < 0.4 * visible:
        return "few letters"
    if counts[33:127].max() > 0.25 * visible:
        return "mostly one character"
    if lines:
        lengths = np.diff(np.flatnonzero(values == 10), prepend=-1, append=len(text))
        if lengths[lengths > 4000].sum() > 0.2 * len(text):  # a paragraph a line stays
            return "very long lines"
    if len(text) >= 4096:
        sample = text[: 1 << 18]
        # Python compresses to 0.25, English to 0.45, base64 to 0.76, generated tables below 0.08.
        ratio = len(zlib.compress(sample, 1)) / len(sample)
        if ratio > 0.7:
            return "encoded data"
        if ratio < 0.08:
            return "repetitive"
    return None


_DROPPED = re.compile(
    r"<(script|style|svg|head|noscript|template)\b.*?</\1\s*>|<!--.*?-->|<[!?][^>]*>",
    re.DOTALL | re.IGNORECASE,
)
_BREAK = re.compile(
    r"</?(?:p|div|br|hr|li|[uod]l|dt|dd|tr|table|h[1-6]|pre|section|article|blockquote)\b[^>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")


def strip_markup(page: str) -> str:
    """The text of an HTML page: scripts and styles dropped, blocks on lines of their own."""
    text = _TAG.sub("", _BREAK.sub("\n", _DROPPED.sub(" ", page)))
    text = html.unescape(text).replace("\xa0", " ")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def _json_texts(text: str) -> list[str] | None:
    texts = []
    for line in text.split("\n"):  # not splitlines(): JSON strings may hold U+2028
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, TypeError, KeyError):
                return None
    return texts if all(isinstance(one, str) for one in texts) else None


def _read(stream: BinaryIO, piece: Piece) -> bytes | None:
    if piece.name.endswith(".gz"):
        stream.seek(0)
        with gzip.open(stream, "rb") as unpacked:
            data = unpacked.read(_WHOLE_BYTES + 1)
        return data if len(data) <= _WHOLE_BYTES else None
    stream.seek(max(piece.begin - 1, 0))
    if piece.begin:  # the line that begins before it is of the piece before
        stream.readline(_LINE_BYTES + 1)
    data = stream.read(max(piece.end - stream.tell(), 0))
    if data and not data.endswith(b"\n"):
        data += stream.readline(_LINE_BYTES)
    return data


def _pieces_of(path: str, name: str, left_out: LeftOut) -> Iterator[Piece]:
    try:
        about = os.stat(path)
    except OSError:
        return  # a broken link
    size = about.st_size
    if not stat.S_ISREG(about.st_mode) or size == 0:
        return
    suffix = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    if suffix in _BINARY or (size > PIECE_BYTES and _is_binary(path) and name[-3:] != ".gz"):
        left_out.add("binary", files=1, size=size)
    elif suffix in _DATA or name.endswith(".dist-info/RECORD"):
        left_out.add("data files", files=1, size=size)
    elif suffix in _HTML or name.endswith(".gz"):
        if size > _WHOLE_BYTES:
            left_out.add("too large to unpack", files=1, size=size)
        else:
            yield Piece(path, name, 0, size, about.st_mtime_ns)
    else:
        for begin in range(0, size, PIECE_BYTES):
            yield Piece(path, name, begin, min(begin + PIECE_BYTES, size), about.st_mtime_ns)


def _is_binary(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return b"\0" in stream.read(_SNIFFED)
    except OSError:
        return False  # read_piece counts it as unreadable


def _files(source: str) -> Iterator[tuple[str, str]]:
    """(path, name below its source) of every file of `source`."""
    path = Path(source).expanduser()
    if source == PACKAGES:
        for folder in _site_packages():
            yield from _walk(folder)
    elif source == STDLIB:
        yield from _walk(sysconfig.get_paths()["stdlib"], skip=_SITE)
    elif source == SYSTEM:
        for folder in _SYSTEM_FOLDERS:
            yield from _walk(folder)
    elif path.is_dir():
        yield from _walk(str(path))
    elif path.is_file():
        yield os.path.abspath(path), path.name
    else:
        yield from _installed(source)


def _installed(name: str) -> Iterator[tuple[str, str]]:
    """The files of an importable or a Debian package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            yield from _walk(folder)
        return
    lists = [_DPKG / f"{name}.list", *_DPKG.glob(f"{name}:*.list")] if "/" not in name else []
    for listed in filter(Path.is_file, lists):
        yield from (
            (one, one)
            for one in listed.read_text(encoding="utf-8").splitlines()
            if os.path.isfile(one)
        )
        return
    raise UserError(
        f"sources: {name} is no file, folder, importable package or Debian package; give one, or "
        f"{', '.join(DEFAULT_SOURCES)}"
    )


def _site_packages() -> list[str]:
    found = [path for path in sys.path if os.path.basename(path.rstrip("/")) in _SITE]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    real = dict.fromkeys(os.path.realpath(path) for path in found)
    return [path for path in real if os.path.isdir(path)]


def _walk(root: str, *, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    for folder, folders, names in os.walk(os.path.abspath(root)):
        folders[:] = [name for name in folders if name not in skip | _SKIPPED_FOLDERS]
        for name in names:
            path = os.path.join(folder, name)
            yield path, os.path.relpath(path, root)
