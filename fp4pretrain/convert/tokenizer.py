"""The files of a run's tokenizer, as transformers reads them from a model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fp4pretrain.data.tiktoken_file import TiktokenTokenizer
from fp4pretrain.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
)
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text

# What a tokenizer's folder may hold beside it stays there: weights, and code above all.
_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_NOT_A_TOKENIZERS = ("config.json", "generation_config.json", "model.safetensors.index.json")


def fitting_tokenizer(name: str, *, vocab_size: int) -> Tokenizer:
    """The tokenizer that ``name`` names. Raises UserError where the model has fewer ids than it."""
    found = load_tokenizer(name)
    if found.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer: {name} has {found.vocab_size} ids and the model model.vocab_size="
            f"{vocab_size}; give the tokenizer that its data was made with"
        )
    return found


def exportable(tokenizer: Tokenizer) -> Tokenizer:
    """Raises UserError for a tokenizer that transformers may read otherwise than we do."""
    if isinstance(tokenizer, SentencePieceTokenizer | TiktokenTokenizer):
        raise UserError(
            f"--tokenizer: transformers may split words otherwise than {tokenizer.name} does; give the "
            "Hugging Face folder of the same vocabulary with --tokenizer"
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put the tokenizer's files into ``folder``; of bytes a tokenizer.json that gives the same ids."""
    if isinstance(tokenizer, ByteTokenizer):
        write_text(folder / "tokenizer.json", _byte_level(tokenizer))
    files = tokenizer_files(tokenizer.name)
    for file in files:
        alone = len(files) == 1
        wanted = file.suffix in _SUFFIXES and file.name not in _NOT_A_TOKENIZERS
        if alone or wanted:
            shutil.copyfile(file, folder / ("tokenizer.json" if alone else file.name))
    if not (folder / "tokenizer_config.json").exists():
        end = tokenizer.decode([tokenizer.eod])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2) + "\n"
        write_text(folder / "tokenizer_config.json", text)


def _byte_level(tokenizer: Tokenizer) -> str:
    """Bytes as a BPE without merges: GPT-2's printable stand-in of byte b has the id b."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {_stand_in(byte): byte for byte in range(256)}
    made: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.eod
    return str(made.to_str())


def _stand_in(byte: int) -> str:
    """The character that byte-level BPE writes for a byte (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
