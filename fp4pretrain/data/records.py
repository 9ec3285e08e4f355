"""Documents out of files of any size, one at a time: text, JSON lines, JSON arrays, compressed ones.

    .jsonl .ndjson    a JSON object a line; the document is its "text" (or another key)
    .json             the same, or one array of such objects
    .parquet .arrow   tables with a column of that name (``columns``)
    anything else     UTF-8 text, cut at line breaks into documents of 64 Ki characters
    NAME.gz NAME.zst  any of these, compressed

Suffixes count in any case. At most a few documents are in memory, never a file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

import zstandard

from fp4pretrain.data.columns import TABLES, table_rows
from fp4pretrain.errors import UserError

DOCUMENT_CHARACTERS = 1 << 16
COMPRESSED = (".gz", ".zst")
_LINES = (".jsonl", ".ndjson")
_CHUNK = 1 << 20
# Compressed bytes that are decompressed at once. Text expands about fivefold, zeros 30,000 times, so the
# number is chosen by how much the last bytes expanded.
_ZSTD_LEAST, _ZSTD_MOST = 1 << 7, 1 << 16
_ZSTD_WINDOW = 1 << 31  # files of `zstd --long=31` are read too
_BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\r\n]*")


class Document(NamedTuple):
    """A text, and the prompt that comes before it."""

    text: str
    prompt: str = ""


@dataclass
class Reading:
    """How records are read, and what became of them.

    Attributes:
        text_key: the key of a JSON object, or the column of a table, that holds the document.
        prompt_key: the key or column of what comes before it and is not to be predicted; None for none.
        skip: pass over a broken record and count it, in place of stopping there.
        skipped: how many were passed over.
        first_skipped: what was wrong with the first of them.
    """

    text_key: str = "text"
    prompt_key: str | None = None
    skip: bool = False
    skipped: int = 0
    first_skipped: str | None = field(default=None)

    def broken(self, what: str) -> None:
        """Raises UserError with the line that says what is wrong, or counts it."""
        if not self.skip:
            raise UserError(f"inputs: {what}, or pass over such records with --on-error skip")
        self.skipped += 1
        self.first_skipped = self.first_skipped or what


def kind_of(name: str) -> str:
    """The suffix that says what a file holds, in small letters, less .gz and .zst."""
    return PurePath(_uncompressed(name)).suffix


def documents_of(
    stream: BinaryIO, name: str, reading: Reading, *, may_skip_file: bool = False
) -> Iterator[Document]:
    """The non-empty documents of one open file.

    Args:
        stream: the file as it lies on disk, at its beginning; it can seek.
        name: decides what is in it, and names it in messages.
        reading: how to read it.
        may_skip_file: text that is not UTF-8 gives no document at all, as for one of the files of a
            folder, and is no error.

    Raises:
        UserError: a broken record (naming file and line), damaged compression, an archive.
    """
    kind = kind_of(name)
    if reading.prompt_key is not None and kind not in (*TABLES, *_LINES, ".json"):
        raise UserError(
            f"--prompt-key: {name} is plain text; give .jsonl, .json or .parquet files, or leave it out"
        )
    if kind == ".tar" or name.lower().endswith(".tgz"):
        raise UserError(f"inputs: {name} is an archive; unpack it and give the folder")
    if kind in TABLES:
        if _uncompressed(name) != name.lower():
            raise UserError(f"inputs: {name} is compressed as a whole; decompress it first")
        for text, prompt in table_rows(stream, name, reading, kind=kind):
            yield Document(text, prompt)
        return
    try:
        plain = _decompressed(stream, name)
        if kind in _LINES:
            yield from _json_lines(plain, name, reading)
        elif kind == ".json":
            yield from _json(plain, name, reading)
        else:
            if may_skip_file:
                if not _is_utf8(plain):
                    return
                stream.seek(0)
                plain = _decompressed(stream, name)
            yield from map(Document, _text(plain, name, reading))
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"inputs: {name} is damaged ({reason}); compress or copy it again"
        ) from None


def cut(pieces: Iterator[str], limit: int) -> Iterator[str]:
    """Text that comes in pieces, in documents of at most ``limit`` characters, each ending at a line
    break if it has one; the same documents however it is divided into pieces."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        begin = 0
        while len(waiting) - begin > limit:
            end = waiting.rfind("\n", begin, begin + limit) + 1 or begin + limit
            yield waiting[begin:end]
            begin = end
        waiting = waiting[begin:]
    if waiting:
        yield waiting


def _uncompressed(name: str) -> str:
    lower = name.lower()
    return next((lower.removesuffix(end) for end in COMPRESSED if lower.endswith(end)), lower)


def _decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    if name.lower().endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[return-value]
    if name.lower().endswith(".zst"):
        return io.BufferedReader(_Zstd(stream), _CHUNK)
    return stream


class _Zstd(io.RawIOBase):
    """A zstd file, of several frames too; a cut one raises EOFError (zstandard's own reader of streams
    takes the end of the file for the end of the text)."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest = b""  # compressed
        self._step = _ZSTD_LEAST
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            waiting = self._rest or self._stream.read(_ZSTD_MOST)
            data, self._rest = waiting[: self._step], waiting[self._step :]
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            if self._frame is None:
                zstd = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
                self._frame = zstd.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            shrink = len(self._ready) > _CHUNK
            self._step = min(
                max(self._step // 2 if shrink else self._step * 2, _ZSTD_LEAST), _ZSTD_MOST
            )
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data + self._rest, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _pieces(stream: BinaryIO) -> Iterator[str]:
    """Decoded text; raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while data := stream.read(_CHUNK):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _is_utf8(stream: BinaryIO) -> bool:
    try:
        for _ in _pieces(stream):
            pass
    except UnicodeDecodeError:
        return False
    return True


def _text(stream: BinaryIO, name: str, reading: Reading) -> Iterator[str]:
    try:
        yield from cut(_pieces(stream), DOCUMENT_CHARACTERS)
    except UnicodeDecodeError:
        reading.broken(f"{name} is not UTF-8 text; convert it first")


def _json(stream: BinaryIO, name: str, reading: Reading) -> Iterator[Document]:
    """One array, or objects line by line: the first character says which."""
    head = b""
    while not head.removeprefix(_BOM).strip() and (data := stream.read(_CHUNK)):
        head += data
    if head.removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _json_array(head, stream, name, reading)
    else:
        yield from _json_lines(_after(head, stream), name, reading)


def _after(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """The lines of ``head`` followed by those of ``stream``."""
    lines = head.split(b"\n")
    yield from lines[:-1]
    yield lines[-1] + stream.readline()
    yield from stream


def _json_lines(
    lines: Iterator[bytes] | BinaryIO, name: str, reading: Reading
) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            reading.broken(f"{where} is not UTF-8; convert the file first")
        except (ValueError, RecursionError):
            reading.broken(f"{where} is not JSON; write one object a line")
        else:
            yield from _document(record, where, reading)


def _json_array(head: bytes, stream: BinaryIO, name: str, reading: Reading) -> Iterator[Document]:
    """The objects of ``[{...}, {...}]``, each parsed as soon as it has been read."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    parser = json.JSONDecoder()
    number, ended, at = 0, False, 0
    try:
        text = decoder.decode(head)
        at = text.index("[") + 1
        while True:
            at = _past_space(text, at)
            if text.startswith("]", at):
                return
            try:
                record, end = parser.raw_decode(text, at)
                end = _past_space(text, end)
                if text[end : end + 1] not in (",", "]"):  # or not read yet: 12 may go on as 123
                    raise ValueError
            except ValueError:
                if ended:
                    break
                # An element is longer than what was read: the next read is twice as long.
                data = stream.read(max(_CHUNK, len(text) - at))
                ended = not data
                text, at = text[at:] + decoder.decode(data, final=ended), 0
                continue
            number += 1
            at = end + (text[end] == ",")
            yield from _document(record, f"{name} element {number}", reading)
    except (UnicodeDecodeError, RecursionError):
        pass
    raise UserError(
        f"inputs: {name} is no whole JSON array after element {number}; correct it, or write one "
        "object a line (.jsonl)"
    )


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _document(record: object, where: str, reading: Reading) -> Iterator[Document]:
    key = reading.text_key
    document = record.get(key) if isinstance(record, dict) else None
    prompt: object = ""
    if isinstance(record, dict) and isinstance(document, str) and reading.prompt_key is not None:
        key = reading.prompt_key
        prompt = record.get(key)
    if isinstance(document, str) and isinstance(prompt, str):
        if document:
            # JSON can spell half a surrogate pair, which no UTF-8 holds: "?" in its place.
            yield Document(*(s.encode(errors="replace").decode() for s in (document, prompt)))
        return
    if not isinstance(record, dict):
        reading.broken(f'{where} is not a JSON object with a string "{key}"; write such objects')
        return
    keys = ", ".join(list(map(str, record))[:8]) or "none"
    what, option = ("text", "--text-key") if prompt == "" else ("prompt", "--prompt-key")
    reading.broken(
        f'{where} has no string "{key}" (its keys: {keys}); name the key of the {what} with {option}'
    )


def open_file(path: Path, name: str) -> BinaryIO:
    """Open to read. Raises UserError where that is not allowed."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"inputs: {name} cannot be read ({error.strerror}); change its permissions"
        ) from None
