"""Text to token ids and back: bytes, a trained BPE, or a Hugging Face tokenizer on disk.

A tokenizer is named by one string, ``data.tokenizer``:

    byte                  256 byte values, and id 256 for the end of a document
    path/tokenizer.json   of the `tokenizers` package; `fp4pretrain data train-bpe` makes one
    path/NAME.model       of SentencePiece
    path/NAME.tiktoken    of tiktoken
    path/                 a Hugging Face tokenizer's folder; nothing is ever downloaded

Documents are encoded as plain text. Special tokens that are spelled out in a document
("<|endoftext|>" stands in many a scraped page) stay the ordinary characters that they are: only
`write_dataset` ends a document.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.errors import UserError, first_line
from fp4pretrain.files import user_path

END_OF_TEXT = "<|endoftext|>"
# Tried in this order where no tokenizer_config.json names an eos_token.
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")


class Tokenizer(ABC):
    """Text to ids.

    Attributes:
        name: what `data.tokenizer` says.
        vocab_size: number of ids; every id is in [0, vocab_size).
        eod: id that ends a document.
        fingerprint: equal for tokenizers that give equal ids.
    """

    def __init__(self, name: str, *, vocab_size: int, eod: int, fingerprint: str) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.eod = eod
        self.fingerprint = fingerprint

    @property
    def unique_identifiers(self) -> OrderedDict[str, str | int]:
        """What megatron-core hashes into the names of its index caches."""
        return OrderedDict(fingerprint=self.fingerprint, vocab_size=self.vocab_size, eod=self.eod)

    @property
    def place(self) -> str:
        """`name` as it means the same file from any folder."""
        path = user_path(self.name, key="data.tokenizer")
        return str(path.resolve()) if self.name != "byte" and path.exists() else self.name

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """One int64 array of ids a text, without any special token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; the end of a document reads as its token's name."""

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, and 256 for the end of a document: nothing to train, nothing to lose."""

    def __init__(self) -> None:
        super().__init__("byte", vocab_size=257, eod=256, fingerprint="byte-257")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that a cut left incomplete read as U+FFFD; ids past 256 (a padded head's) too."""
        end, unknown = END_OF_TEXT.encode(), "\ufffd".encode()
        parts = (bytes([i]) if i < 256 else end if i == self.eod else unknown for i in ids)
        return b"".join(parts).decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` package: a trained BPE or a Hugging Face model's."""

    def __init__(self, name: str, file: Path) -> None:
        tokenizers = import_optional("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain Exception for a file it cannot parse
            raise UserError(
                f"data.tokenizer: {file} is not a tokenizer.json ({error}); "
                "train one with `fp4pretrain data train-bpe`"
            ) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # many published files carry their model's 512 or 1024
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        super().__init__(
            name,
            vocab_size=max(vocabulary.values()) + 1,
            eod=_end_id(vocabulary, file.parent / "tokenizer_config.json", name),
            fingerprint=hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


class TransformersTokenizer(Tokenizer):
    """A Hugging Face folder that has no tokenizer.json: read by `transformers`, offline."""

    def __init__(self, name: str, folder: Path) -> None:
        transformers = import_optional("transformers")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise UserError(
                f"data.tokenizer: {folder} holds no tokenizer that transformers can read "
                f"({reason}); give a folder saved by `save_pretrained`"
            ) from None
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        listing = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1])).encode()
        super().__init__(
            name,
            vocab_size=max(vocabulary.values()) + 1,
            eod=_end_id(vocabulary, folder / "tokenizer_config.json", name),
            fingerprint=hashlib.sha256(listing).hexdigest()[:16],
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. It normalizes text (spaces, Unicode forms), as it was trained to."""

    def __init__(self, name: str, file: Path) -> None:
        sentencepiece = import_optional("sentencepiece")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
        except RuntimeError as error:
            raise UserError(
                f"data.tokenizer: {file} is not a SentencePiece model ({first_line(error)}); "
                "give one, or a tokenizer.json"
            ) from None
        if self._processor.eos_id() < 0:
            raise UserError(
                f"data.tokenizer: {name} has no end-of-document token; train it with an eos_id"
            )
        super().__init__(
            name,
            vocab_size=int(self._processor.get_piece_size()),
            eod=int(self._processor.eos_id()),
            fingerprint=hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encoded = self._processor.encode(list(texts), out_type=int)
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids past the vocabulary (a padded head's) read as unknown."""
        end, unknown = self._processor.id_to_piece(self.eod), self._processor.unk_id()
        parts: list[list[int]] = [[]]
        for one in map(int, ids):
            if one == self.eod:
                parts.append([])
            else:
                parts[-1].append(one if one < self.vocab_size else unknown)
        return str(end.join(self._processor.decode(part) for part in parts))


def tokenizer_files(name: str) -> list[Path]:
    """The files behind what `data.tokenizer` names; none for byte."""
    path = user_path(name, key="data.tokenizer")
    if name == "byte" or not path.exists():
        return []
    if path.suffix == ".tiktoken":
        return [file for file in (path, path.with_suffix(".json")) if file.is_file()]
    return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        UserError: unknown name, missing path, unreadable file, or no end-of-document token.
    """
    try:
        return _load(name)
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {error.filename or name} cannot be read ({error.strerror}); change its "
            "permissions, or give another tokenizer"
        ) from None


def _load(name: str) -> Tokenizer:
    if name == "byte":
        return ByteTokenizer()
    path = user_path(name, key="data.tokenizer")
    if path.is_dir():
        file = path / "tokenizer.json"
        return FileTokenizer(name, file) if file.is_file() else TransformersTokenizer(name, path)
    if path.is_file() and path.suffix == ".tiktoken":
        from fp4pretrain.data.tiktoken_file import TiktokenTokenizer

        return TiktokenTokenizer(name, path)
    if path.is_file():
        made = SentencePieceTokenizer if path.suffix == ".model" else FileTokenizer
        return made(name, path)
    if path.suffix == ".json" or path.name != name:
        raise UserError(
            f"data.tokenizer: {name} does not exist; give byte, a tokenizer.json, a SentencePiece .model, a "
            ".tiktoken file or a Hugging Face tokenizer's local folder"
        )
    raise UserError(
        f"data.tokenizer: unknown tokenizer '{name}'; give byte, a tokenizer.json, a SentencePiece "
        ".model, a .tiktoken file or a Hugging Face tokenizer's local folder"
    )


def _end_id(vocabulary: dict[str, int], config: Path, name: str) -> int:
    """The id that ends a document: the config's eos_token, else the first customary name."""
    named: Any = json.loads(config.read_bytes()).get("eos_token") if config.is_file() else None
    if isinstance(named, dict):  # older files write {"content": "</s>", ...}
        named = named.get("content")
    for token in (named, *END_TOKENS):
        if token in vocabulary:
            return vocabulary[token]
    raise UserError(
        f"data.tokenizer: {name} has no end-of-document token; "
        f"name one of its tokens as eos_token in {config.name}"
    )


def import_optional(package: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(
            f"data.tokenizer: needs the {package} package; pip install {package}"
        ) from None
