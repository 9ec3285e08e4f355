"""The work behind `fp4pretrain data`: build a dataset, train a BPE, look into a dataset.

prepare_text(["books/", "web.jsonl"], "data/mine", tokenizer="byte")
train_bpe(["stdlib"], vocab_size=8192, out="data/bpe8k")
inspect("data/mine")
"""

from __future__ import annotations

import array
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fp4pretrain.data.ids import PADDING, scan
from fp4pretrain.data.indexed import DatasetIndex, is_meta, read_index, write_dataset
from fp4pretrain.data.manifest import check_content
from fp4pretrain.data.records import Document, Reading
from fp4pretrain.data.text import STDLIB, TextFile, list_files, read_records
from fp4pretrain.data.tokenizers import END_OF_TEXT, Tokenizer, load_tokenizer, tokenizer_files
from fp4pretrain.errors import UserError
from fp4pretrain.files import unwritable, user_path, write_text

_CORPUS_FORMAT = 1  # raise it when the same files come to give other tokens
_BATCH_CHARACTERS = 1 << 20  # texts encoded at once: enough for every core, little memory
_BYTES = 256


def prepare_text(
    inputs: Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer: str = "byte",
    *,
    reading: Reading | None = None,
    force: bool = False,
) -> DatasetIndex:
    """Tokenize text or JSON files and folders into the indexed dataset OUT_PREFIX.{bin,idx,json}.

    Args:
        inputs: files, folders, or "stdlib"; see `fp4pretrain.data.text` for their order.
        out_prefix: where to write; what is there is replaced at the end, or left as it is.
        tokenizer: see `load_tokenizer`.
        reading: the key of the text and what to do with broken records; it counts those passed over.
        force: replace a dataset that is there.

    Raises:
        UserError: a missing or unreadable input, a broken record, no text, an unknown tokenizer, no
            write access, a dataset in the way, or an output that is an input.
    """
    files = list_files(inputs)
    prefix = str(user_path(out_prefix, key="out"))
    loaded = load_tokenizer(tokenizer)
    _check_target(prefix, [file.path for file in files] + tokenizer_files(tokenizer), force=force)
    source = ", ".join(str(given) for given in inputs)
    return _tokenize(files, prefix, tokenizer=loaded, source=source, reading=reading or Reading())


def stdlib_corpus(cache: Path, tokenizer: Tokenizer, *, build: bool) -> str:
    """The prefix of the running Python's standard library in `cache`, built there if it is not.

    The name holds the Python version and a hash of the tokenizer and of every file's name and
    size, so another Python or tokenizer makes another dataset and nothing goes stale.

    Args:
        cache: the cache folder.
        tokenizer: what to encode with.
        build: whether this process may build; one that may not expects to find it.

    Raises:
        UserError: `build` is false and there is none, or the folder cannot be written.
    """
    files = list_files([STDLIB])
    listing = [[file.name, file.size] for file in files]
    identity = json.dumps([_CORPUS_FORMAT, tokenizer.unique_identifiers, listing])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    prefix = str(cache / "corpus" / f"{STDLIB}-{platform.python_version()}-{digest}")
    if Path(f"{prefix}.idx").exists():
        return prefix
    if not build:
        raise UserError(
            f"data.cache_dir: {prefix}.idx is not visible on every rank; set data.cache_dir to a "
            "folder that all nodes share (and run the same Python on each)"
        )
    source = f"{STDLIB} of Python {platform.python_version()}"
    _tokenize(files, prefix, tokenizer=tokenizer, source=source)
    return prefix


def train_bpe(
    inputs: Sequence[str | Path],
    vocab_size: int,
    out: str | Path,
    *,
    reading: Reading | None = None,
) -> Path:
    """Train a byte-level BPE on `inputs` and save it as a tokenizer.json.

    Byte-level: its alphabet is all 256 bytes, so it encodes any text without an unknown token.

    Args:
        inputs: files, folders, or "stdlib".
        vocab_size: number of ids wanted, the end token and the 256 bytes included; little text
            may give fewer.
        out: a .json file, or a folder that gets a tokenizer.json.
        reading: as for `prepare_text`.

    Returns:
        The file written, to be named in `data.tokenizer`.

    Raises:
        UserError: a vocabulary below 257, no text, no write access, or an output that is an input.
    """
    if vocab_size < _BYTES + 1:
        raise UserError(
            f"vocab_size: {vocab_size} is too small; a byte-level BPE needs {_BYTES + 1} or more"
        )
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    files = list_files(inputs)
    path = user_path(out, key="out")
    path = path if path.suffix == ".json" else path / "tokenizer.json"
    _refuse_input(path, [file.path for file in files])
    with _progress("reading", files, reading) as documents:
        texts = (document.prompt + document.text for document in documents)
        trained.train_from_iterator(texts, trainer=trainer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, trained.to_str(pretty=True) + "\n")
    except OSError as error:
        raise unwritable("out", path.parent, error) from None
    return path


def inspect(
    prefix: str | Path, *, tokenizer: str | None = None, console: Console | None = None
) -> DatasetIndex:
    """Print what PREFIX holds: documents, tokens, dtype, size, tokenizer, a decoded sample.

    Args:
        prefix: the dataset, without .bin or .idx.
        tokenizer: to decode the sample with; None is the one PREFIX.json names, if any.
        console: where to print; None is standard output.

    Raises:
        UserError: as `read_index`, or an unknown tokenizer.
    """
    index = read_index(str(user_path(prefix, key="prefix")), key="prefix")
    lengths, ids = index.lengths(), scan(index)
    table = Table(title=str(prefix), show_header=False)
    rows = {
        "documents": f"{index.documents:,}",
        "tokens": f"{index.tokens:,}",
        "tokens a document": f"{lengths.mean():,.0f} ({lengths.min():,} to {lengths.max():,})",
        "largest id": f"{ids.largest:,}",
        "dtype": str(index.dtype),
        "size": f"{index.size_bytes / 2**20:,.1f} MiB",
        "tokenizer": str(index.meta.get("tokenizer", "not recorded")),
        "source": str(index.meta.get("source", "not recorded")),
    }
    if ids.smallest < PADDING:
        rows["smallest id"] = f"{ids.smallest:,}: cannot be trained on"
    if index.prompts is not None:
        rows["prompts"] = f"{int(index.prompts.sum()):,} tokens, left out of the loss"
    if ids.padding:
        rows["padding (id -1)"] = f"{ids.padding:,} of {ids.scanned:,} tokens read"
    if tokenizer is not None:
        rows["begins"] = _sample(index, tokenizer)
    elif "tokenizer" in index.meta:
        try:
            rows["begins"] = _sample(index, str(index.meta["tokenizer"]))
        except UserError:  # moved since, or named by a path from another folder
            rows["begins"] = (
                "its tokenizer is not there now; name it with --tokenizer to see the text"
            )
    for name, value in rows.items():
        table.add_row(name, value.replace("[", r"\["))
    (console or Console()).print(table)
    return index


def verify(prefix: str | Path) -> str:
    """One line that says PREFIX is whole: its index fits its tokens, and all files have the content that
    was written, where a manifest says which.

    Raises:
        UserError: as `read_index`, and for other content.
    """
    index = read_index(str(user_path(prefix, key="prefix")), key="prefix")
    try:
        files = check_content(index.prefix, index.meta, key="prefix")
    except OSError as error:
        raise UserError(
            f"prefix: {error.filename or prefix} cannot be read ({error.strerror}); copy it again"
        ) from None
    has = f"{prefix}: {index.documents:,} documents, {index.tokens:,} tokens"
    if not files:
        return f"{has}; sizes fit its index, and no manifest says what its content was"
    return f"{has}; {files} files have the content that was written"


def _sample(index: DatasetIndex, tokenizer: str) -> str:
    first = index.read(0, min(160, index.tokens))
    return load_tokenizer(tokenizer).decode(first[first >= 0].tolist())


def _check_target(prefix: str, inputs: Sequence[Path], *, force: bool) -> None:
    """Raises UserError where PREFIX's files are inputs, not a dataset's, or there without `force`."""
    for suffix in (".bin", ".idx", ".json"):
        _refuse_input(Path(prefix + suffix), inputs)
    meta = Path(f"{prefix}.json")
    if meta.exists() and not is_meta(meta):
        raise UserError(
            f"out: {meta} is there and is no dataset's; choose another --out, which names new files"
        )
    there = [name for name in (f"{prefix}.idx", f"{prefix}.bin") if Path(name).exists()]
    if there and not force:
        raise UserError(
            f"out: {there[0]} exists; add --force to replace it, or choose another --out"
        )


def _refuse_input(out: Path, inputs: Sequence[Path]) -> None:
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise UserError(f"out: {out} is one of the inputs; choose another --out")


def _tokenize(
    files: Sequence[TextFile],
    prefix: str,
    *,
    tokenizer: Tokenizer,
    source: str,
    reading: Reading | None = None,
) -> DatasetIndex:
    key = "out" if reading is not None else "data.cache_dir"
    wanted = reading is not None and reading.prompt_key is not None
    prompts = array.array("i") if wanted else None
    with _progress("tokenizing", files, reading) as documents:
        ids = _encode(documents, tokenizer, prompts)
        return write_dataset(
            ids, prefix, tokenizer=tokenizer, source=source, key=key, prompts=prompts
        )


def _encode(
    documents: Iterator[Document], tokenizer: Tokenizer, prompts: array.array | None
) -> Iterator[NDArray[np.int64]]:
    """Ids a document, in order, encoded in batches that keep a parallel tokenizer busy. Prompts are
    encoded apart, as they are when a model is asked; how long each is goes to ``prompts``."""
    batch: list[Document] = []
    waiting = 0

    def encoded() -> Iterator[NDArray[np.int64]]:
        texts = tokenizer.encode_batch([document.text for document in batch])
        if prompts is None:
            yield from texts
            return
        asked = tokenizer.encode_batch([document.prompt for document in batch])
        for prompt, text in zip(asked, texts, strict=True):
            prompts.append(len(prompt))
            yield np.concatenate([prompt, text])

    for document in documents:
        batch.append(document)
        waiting += len(document.text) + len(document.prompt)
        if waiting >= _BATCH_CHARACTERS:
            yield from encoded()
            batch, waiting = [], 0
    if batch:
        yield from encoded()


@contextmanager
def _progress(
    label: str, files: Sequence[TextFile], reading: Reading | None
) -> Iterator[Iterator[Document]]:
    """The documents of `files`, moving a bar by the bytes read; silent away from a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(label, total=sum(file.size for file in files))
        yield read_records(files, reading, watch=partial(bar.wrap_file, task_id=task))
