"""What a run says about its data, and every check that can be made before training begins.

`data.path` is one of
    null                                    Python's standard library, tokenized once into the cache
    some/prefix                             one indexed dataset
    {web: {prefix: a, weight: 3}, ...}      a blend: samples are drawn in proportion to weight
    [a, {prefix: b, weight: 3}, ...]        the same without names
A member of a blend says `weight` or `epochs`: in place of shares, how often each is read in one pass over
all. `max_epochs` and `max_tokens` cap what a run reads of it; then the others share what is left.
`data.split` gives the shares of train, validation and test. A hash of its content decides on which
side a document is: see `documents`. `data.valid` names other text to validate on, in place of a share.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp4pretrain.data.ids import check_ids, has_id
from fp4pretrain.data.indexed import DatasetIndex, read_index
from fp4pretrain.data.text import STDLIB, list_files
from fp4pretrain.data.tokenizers import Tokenizer, load_tokenizer
from fp4pretrain.errors import UserError
from fp4pretrain.files import unwritable, user_cache, user_path
from fp4pretrain.units import tokens_of

# Options that say what the end of a document means.
ENDS = ("document_mask", "reset_positions", "eod_mask_loss")


@dataclass(frozen=True)
class DataSpec:
    """The data of one run.

    Attributes:
        path: None, an indexed dataset's prefix, or a blend: {name: {"prefix": ..., "weight": ...}}, or
            a list of prefixes and such members.
        tokenizer: see `load_tokenizer`.
        split: shares of training, validation and test; any scale, "0.98,0.02,0" or "98,2".
        seq_length: tokens a sample.
        valid: None validates on the validation share of `split`; a prefix, or {name: prefix}, on
            those datasets, whole, and then that share is trained on.
        valid_tokens: how many tokens of each validation set to read at most; None is all of it.
        seed: of the order of documents and samples, and of mock tokens.
        cache_dir: for the built corpus, documents' hashes and large orders; None is the user's
            cache folder. All nodes of a run must share it.
        mock: uniform random tokens in place of data, for benchmarks.
        vocab_size: the model's, which the tokens must fit; None is the tokenizer's.
        document_mask: samples say which document each token is of, for attention to stop at its end.
        reset_positions: positions begin again with every document.
        eod_mask_loss: what follows the end of a document is not predicted.
    """

    path: str | Mapping[str, Any] | Sequence[Any] | None = None
    tokenizer: str = "byte"
    split: str = "0.98,0.02,0"
    valid: str | Mapping[str, Any] | None = None
    valid_tokens: int | None = 4_000_000
    seq_length: int = 1024
    seed: int = 1234
    cache_dir: str | None = None
    mock: bool = False
    vocab_size: int | None = None
    document_mask: bool = False
    reset_positions: bool = False
    eod_mask_loss: bool = False

    @property
    def cache(self) -> Path:
        """`cache_dir`, or the user's (`user_cache`)."""
        if self.cache_dir is not None:
            return user_path(self.cache_dir, key="data.cache_dir")
        return user_cache()


@dataclass(frozen=True)
class Part:
    """One dataset of a blend; `weight` sums to 1 over the blend.

    Attributes:
        key: the config key that names it, for messages.
        prefix: where it lies.
        weight: its share of the samples; None where all members say ``epochs``.
        epochs: how often it is read in one pass over the blend.
        max_epochs: at most so often by one run.
        max_tokens: at most so many tokens of it.
    """

    key: str
    prefix: str
    weight: float | None = 1.0
    epochs: float | None = None
    max_epochs: float | None = None
    max_tokens: int | None = None


def parts_of(spec: DataSpec) -> list[Part]:
    """The datasets `data.path` names, weights normalized; none where it is null.

    Raises:
        UserError: an empty blend, a member without prefix, a number that is not above 0, or members of
            which some say weight and some epochs.
    """
    if spec.path is None:
        return []
    if isinstance(spec.path, str):
        return [Part("data.path", str(user_path(spec.path, key="data.path")), 1.0)]
    if not spec.path:
        raise UserError(
            "data.path: the blend is empty; name at least one {prefix: ..., weight: ...}"
        )
    if isinstance(spec.path, Mapping):
        members = {f"data.path.{name}": member for name, member in spec.path.items()}
    else:
        members = {
            f"data.path[{number}]": {"prefix": member} if isinstance(member, str) else member
            for number, member in enumerate(spec.path)
        }
    parts = [_part(key, member) for key, member in members.items()]
    shares = [part.weight for part in parts if part.weight is not None]
    if not shares:
        return parts
    if len(shares) < len(parts):
        named = next(part for part in parts if part.weight is None)
        raise UserError(
            f"{named.key}.epochs: other members have weights; give every member epochs, or every one a "
            "weight (max_epochs caps what is read)"
        )
    total = sum(shares)
    return [replace(part, weight=share / total) for part, share in zip(parts, shares, strict=True)]


def _part(key: str, member: Any) -> Part:
    """One member of a blend, its weight as it is given."""
    if not isinstance(member, Mapping) or not isinstance(member.get("prefix"), str):
        raise UserError(f"{key}: needs a prefix; write {{prefix: some/prefix, weight: 1}}")
    names = ("weight", "epochs", "max_epochs", "max_tokens")
    unknown = sorted(map(str, member.keys() - {"prefix", *names}))
    if unknown:
        raise UserError(f"{key}.{unknown[0]}: no such key; use prefix, {', '.join(names)}")
    if "weight" in member and "epochs" in member:
        raise UserError(f"{key}.epochs: it has a weight too; give one (max_epochs is a cap)")
    numbers = {name: member[name] for name in names if member.get(name) is not None}
    if "max_tokens" in numbers:
        numbers["max_tokens"] = tokens_of(numbers["max_tokens"], key=f"{key}.max_tokens")
    for name, value in numbers.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise UserError(f"{key}.{name}: {value} is not above 0; give a positive number")
    if "epochs" not in numbers:
        numbers.setdefault("weight", 1.0)
    return Part(
        key,
        str(user_path(member["prefix"], key=key)),
        weight=float(numbers["weight"]) if "weight" in numbers else None,
        epochs=numbers.get("epochs"),
        max_epochs=numbers.get("max_epochs"),
        max_tokens=numbers.get("max_tokens"),
    )


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of training, validation and test, scaled to sum to 1.

    Raises:
        UserError: not two or three numbers, one below 0, or no training share.
    """
    try:
        shares = [float(part) for part in str(split).split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (2, 3) or not all(0 <= share < math.inf for share in shares):
        raise UserError(
            f"data.split: '{split}' is not two or three shares; "
            "write training,validation,test such as 0.98,0.02,0"
        )
    if shares[0] == 0:
        raise UserError(f"data.split: '{split}' leaves no training data; give the first share > 0")
    total = sum(shares)
    train, valid, test = (share / total for share in (*shares, 0.0)[:3])
    return train, valid, test


def valid_parts_of(spec: DataSpec) -> dict[str, Part]:
    """The datasets of `data.valid` by name; none where it is null.

    Raises:
        UserError: no name, or a name without a prefix.
    """
    if spec.valid is None:
        return {}
    if isinstance(spec.valid, str):
        return {"validation": Part("data.valid", str(Path(spec.valid).expanduser()), 1.0)}
    if not spec.valid:
        raise UserError("data.valid: it names no dataset; write some/prefix or {name: some/prefix}")
    parts = {}
    for name, prefix in spec.valid.items():
        if not isinstance(prefix, str) or not prefix:
            raise UserError(f"data.valid.{name}: needs a prefix; write {{{name}: some/prefix}}")
        parts[str(name)] = Part(f"data.valid.{name}", str(Path(prefix).expanduser()), 1.0)
    return parts


def validate(spec: DataSpec) -> None:
    """Everything that can be known before training: on any rank, in well under a second.

    Raises:
        UserError: naming the key and the cure.
    """
    tokenizer = load_tokenizer(spec.tokenizer)
    if spec.vocab_size is not None and tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"model.vocab_size: {spec.vocab_size} is below the {tokenizer.vocab_size} ids of "
            f"tokenizer {tokenizer.name}; set model.vocab_size={tokenizer.vocab_size} or more"
        )
    if spec.seq_length < 1:
        raise UserError(f"model.seq_length: {spec.seq_length} is not positive; give at least 1")
    if spec.mock:
        return
    parse_split(spec.split)
    _check_writable(spec)
    parts = parts_of(spec)
    if not parts:
        list_files([STDLIB])
    if len(parts) > 1:
        _check_helpers()
    for part in parts:
        index = read_index(part.prefix, key=part.key)
        check_dataset(spec, index, key=part.key, tokenizer=tokenizer)
        _check_split(spec, index, key=part.key)
    for part in valid_parts_of(spec).values():
        index = read_index(part.prefix, key=part.key)
        check_dataset(spec, index, key=part.key, tokenizer=tokenizer)


def check_dataset(spec: DataSpec, index: DatasetIndex, *, key: str, tokenizer: Tokenizer) -> None:
    """Whether one dataset can serve `spec`: its tokenizer, its ids.

    Raises:
        UserError: naming the key and the cure.
    """
    made_by = index.meta.get("tokenizer", tokenizer.name)
    if index.meta.get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer: {tokenizer.name} is not what {index.prefix} was built with; "
            f"set data.tokenizer={made_by} or build the dataset again"
        )
    check_ids(index, vocab_size=spec.vocab_size, key=key)
    wanted = [name for name in ENDS if getattr(spec, name)]
    if wanted and not has_id(index, tokenizer.eod):
        raise UserError(
            f"data.{wanted[0]}: {index.prefix} has no token {tokenizer.eod}, which ends a document for "
            f"tokenizer {tokenizer.name}; build it with `fp4pretrain data build` (Megatron's tools: "
            f"--append-eod), or set data.{wanted[0]}=false"
        )


def _check_split(spec: DataSpec, index: DatasetIndex, *, key: str) -> None:
    """What the number of documents says of a split; who is on which side is known when they are
    read. A validation share that rounds to no document is refused."""
    _, valid, _ = parse_split(spec.split)
    if spec.valid is None and round(valid * index.documents) == 0:
        raise UserError(
            f"data.split: '{spec.split}' leaves no validation data of the {index.documents} "
            f"documents in {index.prefix}; raise that share, give more documents, or name another "
            "dataset as data.valid"
        )
    if index.tokens < spec.seq_length + 1:
        raise UserError(
            f"{key}: {index.tokens:,} tokens in {index.prefix} are too few for one sample of "
            f"{spec.seq_length:,} + 1; give more text or a shorter model.seq_length"
        )


def _check_helpers() -> None:
    """megatron-core's wheels carry the compiled index builder; a source install may not."""
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        raise UserError(
            "megatron-core: its dataset helpers are not compiled; run python -c 'from "
            "megatron.core.datasets.utils import compile_helpers; compile_helpers()' once "
            "(needs make, g++ and pybind11)"
        ) from None


def _check_writable(spec: DataSpec) -> None:
    try:
        spec.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=spec.cache):
            pass
    except OSError as error:
        raise unwritable("data.cache_dir", spec.cache, error) from None
