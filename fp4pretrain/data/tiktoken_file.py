"""tiktoken's vocabularies on disk: NAME.tiktoken, a line for each token (base64, rank).

The file does not say how text is split before merging, nor which tokens are special. Of OpenAI's
encodings that is known by name; any other has a NAME.json beside it, with what `tiktoken.Encoding` takes:
``{"pat_str": "...", "special_tokens": {"<|endoftext|>": 50256}}``. Nothing is downloaded or guessed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4pretrain.data.tokenizers import END_OF_TEXT, END_TOKENS, Tokenizer, import_optional
from fp4pretrain.errors import UserError, first_line

# tiktoken_ext/openai_public.py of tiktoken 0.12 (MIT): how text is split, and the special tokens.
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"""[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    rf"""|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_FILL = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (_GPT2, {END_OF_TEXT: 50256}),
    "p50k_base": (_GPT2, {END_OF_TEXT: 50256}),
    "cl100k_base": (
        _CL100K,
        {END_OF_TEXT: 100257, **dict(zip(_FILL, range(100258, 100261), strict=True))}
        | {"<|endofprompt|>": 100276},
    ),
    "o200k_base": (_O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


class TiktokenTokenizer(Tokenizer):
    """A .tiktoken file; text is encoded without special tokens."""

    def __init__(self, name: str, file: Path) -> None:
        tiktoken = import_optional("tiktoken")
        pattern, special = _described(name, file)
        ranks = _ranks(file)
        try:
            self._encoding = tiktoken.Encoding(
                file.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            reason = first_line(error)
            raise UserError(
                f"data.tokenizer: tiktoken cannot use {name} ({reason}); correct its pat_str"
            ) from None
        end = next((token for token in END_TOKENS if token in special), None)
        if end is None:
            raise UserError(
                f"data.tokenizer: {name} has no end-of-document token; give one of its special_tokens the "
                f"name {END_OF_TEXT}"
            )
        facts = [sorted(special.items()), pattern, hashlib.sha256(file.read_bytes()).hexdigest()]
        super().__init__(
            name,
            vocab_size=int(self._encoding.max_token_value) + 1,
            eod=special[end],
            fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encoded = self._encoding.encode_ordinary_batch(list(texts))
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids that no token has (a padded head's) read as U+FFFD, and so do incomplete characters."""
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def _bytes(self, one: int) -> bytes:
        try:
            return bytes(self._encoding.decode_single_token_bytes(int(one)))
        except KeyError:
            return "\ufffd".encode()


def _described(name: str, file: Path) -> tuple[str, dict[str, int]]:
    """How text is split, and the special tokens."""
    said = file.with_suffix(".json")
    if not said.is_file():
        if file.stem in _KNOWN:
            return _KNOWN[file.stem]
        raise UserError(
            f"data.tokenizer: {name} is none of {', '.join(_KNOWN)}; put {said.name} beside it, with "
            '{"pat_str": how text is split, "special_tokens": {"<|endoftext|>": id}}'
        )
    try:
        found: Any = json.loads(said.read_bytes())
        pattern, special = found["pat_str"], found["special_tokens"]
        good = isinstance(pattern, str) and all(type(i) is int and i >= 0 for i in special.values())
    except (ValueError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f"data.tokenizer: {said} does not say how {file.name} is used; write "
            '{"pat_str": "...", "special_tokens": {"<|endoftext|>": id}}'
        )
    return pattern, dict(special)


def _ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank. (tiktoken's own reader keeps a copy by path, which a new file there would not
    replace.)"""
    found: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"data.tokenizer: {file} line {number} is no token of a .tiktoken file (base64 and a "
                "rank); copy it again"
            ) from None
    missing = sum(bytes([byte]) not in found for byte in range(256))
    if missing:
        raise UserError(
            f"data.tokenizer: {file} lacks {missing} of the 256 single bytes, so it cannot encode all text; "
            "copy it again"
        )
    return found
