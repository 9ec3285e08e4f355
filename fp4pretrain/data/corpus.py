"""Real text without a hub: a dataset made of what a machine has on its disk.

build_corpus("data/text")                                   this Python's packages and the machine's docs
build_corpus("data/text", ["torch", "notes/", "linux-doc"])

Stages, each in worker processes of one thread: read and clean every file, keep one of equal documents,
train a BPE on an even sample, encode. Between them the text lies in PREFIX.building, in groups of a few
MB. Files lie in the order of a hash of their names, so the dataset is the same for any number of
workers, and the sample is fair. A build that was killed continues with the groups it has, and with the
tokenizer once that is trained, as long as no file has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fp4pretrain.data import corpus_work
from fp4pretrain.data.build import train_bpe
from fp4pretrain.data.corpus_files import DEFAULT_SOURCES, LeftOut, Piece, list_pieces
from fp4pretrain.data.indexed import DatasetIndex, read_index, unwritable, write_index
from fp4pretrain.data.manifest import FILES, described
from fp4pretrain.data.tokenizers import load_tokenizer
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text

_FORMAT = 1  # raise it when the same files come to give other tokens
_GROUP_BYTES = 2 << 20  # files of one task: hundreds of tasks, so that all cores end together
_SAMPLE_BYTES = 100 << 20  # text that the BPE is trained on
_SAMPLE_FILE_BYTES = 16 << 20
_SMALLEST_VOCABULARY = 257
_NO_TEXT = "sources: no text in them; give folders or packages that hold some"
_SUFFIXES = (
    ".tokenizer.json",
    ".bin",
    ".json",
    ".idx",
)  # the index last: it says that all is there


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` made.

    Attributes:
        index: of the dataset.
        tokenizer: its tokenizer.json, for `data.tokenizer`.
        text_bytes: UTF-8 bytes of its documents.
        left_out: reasons, each with files (for duplicates: documents) and bytes.
    """

    index: DatasetIndex
    tokenizer: Path
    text_bytes: int
    left_out: dict[str, list[int]]

    def table(self) -> Table:
        """The corpus as a rich table."""
        table = Table("", "files", "bytes", "tokens", title=self.index.prefix)
        kept = f"{self.index.documents:,} documents"
        table.add_row("kept", kept, f"{self.text_bytes:,}", f"{self.index.tokens:,}")
        for reason, (files, size) in sorted(self.left_out.items(), key=lambda one: -one[1][1]):
            table.add_row(f"left out: {reason}", f"{files:,}", f"{size:,}", "")
        for column in table.columns[1:]:
            column.justify = "right"
        return table


def build_corpus(
    out_prefix: str | Path,
    sources: Sequence[str] = DEFAULT_SOURCES,
    *,
    vocab_size: int = 8192,
    workers: int | None = None,
    force: bool = False,
) -> Corpus:
    """Make the indexed dataset OUT_PREFIX.{bin,idx,json} and OUT_PREFIX.tokenizer.json.

    Args:
        out_prefix: where to write.
        sources: see `fp4pretrain.data.corpus_files`.
        vocab_size: ids of the BPE, at least 257; little text may give fewer.
        workers: processes; None is one for every core that this process may use.
        force: replace a dataset that is there.

    Raises:
        UserError: the output exists or cannot be written, an unknown source, no text, another
            build at work on OUT_PREFIX, a worker that was killed.
    """
    prefix = str(out_prefix)
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size: {vocab_size} is too small; a byte-level BPE needs "
            f"{_SMALLEST_VOCABULARY} or more"
        )
    if count < 1:
        raise UserError(f"--workers: {workers} is too few; give 1 or more")
    folder = Path(f"{prefix}.building")
    there = [suffix for suffix in _SUFFIXES if Path(prefix + suffix).exists()]
    # Output files beside an unfinished build are that build's: it was killed while renaming them.
    if there and not force and (".idx" in there or not folder.is_dir()):
        raise UserError(
            f"--out: {prefix}{there[-1]} exists; give another prefix, or --force to replace it"
        )
    own = [os.path.abspath(prefix + suffix) for suffix in (".building", *_SUFFIXES)]
    pieces, left_out = list_pieces(sources, skip=own)
    if not pieces:
        raise UserError(_NO_TEXT)
    try:
        with _alone(folder):
            _continue_or_begin(folder, _identity(pieces, vocab_size))
            with _pool(count) as pool:
                return _build(
                    pool, folder, prefix, pieces=pieces, left_out=left_out, vocab=vocab_size
                )
    except BrokenProcessPool:
        raise UserError(
            "--workers: a worker was killed (out of memory?); run it again to continue, with fewer"
        ) from None
    except OSError as error:
        raise unwritable("--out", folder.parent, error) from None


def _build(
    pool: ProcessPoolExecutor,
    folder: Path,
    prefix: str,
    *,
    pieces: list[Piece],
    left_out: LeftOut,
    vocab: int,
) -> Corpus:
    groups = list(_groups(pieces))
    numbers = range(len(groups))
    sizes = [sum(piece.size for piece in group) for group in groups]
    todo = [(folder, i, groups[i]) for i in numbers if not _has(folder, f"text-{i:05}.npz")]
    _all(pool, corpus_work.read_group, todo, label="reading", sizes=sizes)

    texts = [corpus_work.load_group(folder, i) for i in numbers]
    for text in texts:
        left_out.merge(text.left_out)
    keeps = _first_of_equal([text.hashes for text in texts])
    kept = [int(text.lengths[keep].sum()) for text, keep in zip(texts, keeps, strict=True)]
    equal = sum(len(keep) - int(keep.sum()) for keep in keeps)
    if equal:
        total = sum(int(text.lengths.sum()) for text in texts)
        left_out.add("duplicates", files=equal, size=total - sum(kept))
    if not any(kept):
        raise UserError(_NO_TEXT)

    trained = folder / "tokenizer.json"
    if not trained.exists():
        _train(folder, keeps, share=_SAMPLE_BYTES / sum(kept), vocab=vocab)
    tokenizer = load_tokenizer(str(trained))
    dtype = "uint16" if tokenizer.vocab_size < 65500 else "int32"  # megatron-core's rule
    waiting = [
        (folder, i, keeps[i], trained, dtype)
        for i in numbers
        if not _has(folder, f"ids-{i:05}.npy")
    ]
    _all(pool, corpus_work.encode_group, waiting, label="tokenizing", sizes=kept)

    largest = _join(folder, len(groups), dtype)
    target = f"{prefix}.tokenizer.json"
    meta: dict[str, object] = {
        "source": f"corpus of {len(pieces):,} files",
        "tokenizer": target,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "largest_id": largest,
        "text_bytes": sum(kept),
        "left_out": left_out.reasons,
    }
    meta[FILES] = described(str(folder / "whole"), (".bin", ".idx"))
    write_text(folder / "whole.json", json.dumps(meta, indent=2) + "\n")
    shutil.copyfile(trained, folder / "whole.tokenizer.json")
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for suffix in _SUFFIXES:
        (folder / f"whole{suffix}").replace(prefix + suffix)
    return Corpus(read_index(prefix, key="--out"), Path(target), sum(kept), left_out.reasons)


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.size
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _first_of_equal(hashes: list[NDArray[np.uint64]]) -> list[NDArray[np.bool_]]:
    """For each group which documents are the first of their content, over all groups in order."""
    together = np.concatenate([np.empty(0, np.uint64), *hashes])
    keep = np.zeros(len(together), dtype=np.bool_)
    keep[np.unique(together, return_index=True)[1]] = True
    return np.split(keep, np.cumsum([len(one) for one in hashes])[:-1])


def _train(folder: Path, keeps: list[NDArray[np.bool_]], *, share: float, vocab: int) -> None:
    """Train the BPE on `share` of the documents, chosen by their hashes: an even sample."""
    sample = folder / "sample"
    shutil.rmtree(sample, ignore_errors=True)
    sample.mkdir()
    waiting: list[bytes] = []
    files = 0
    for number, keep in enumerate(keeps):
        hashes = corpus_work.load_group(folder, number).hashes
        chosen = keep & (hashes <= np.uint64(min(share, 1.0) * (2**64 - 2048)))
        waiting += corpus_work.documents_of(folder, number, chosen)
        if number == len(keeps) - 1 or sum(map(len, waiting)) >= _SAMPLE_FILE_BYTES:
            (sample / f"{files:05}.txt").write_bytes(b"\n".join(waiting))
            waiting, files = [], files + 1
    with _progress() as bar:
        bar.add_task("training the BPE", total=None)
        made = train_bpe([sample], vocab, folder / "training.json")
    made.replace(folder / "tokenizer.json")
    shutil.rmtree(sample)


def _join(folder: Path, groups: int, dtype: str) -> int:
    """Copy the groups' ids into whole.bin, in order, and write whole.idx; returns the largest id."""
    lengths, largest = [], 0
    with open(folder / "whole.bin", "wb") as whole:
        for number in range(groups):
            top, of_group = corpus_work.load_lengths(folder, number)
            lengths.append(of_group)
            largest = max(largest, top)
            with open(folder / f"ids-{number:05}.bin", "rb") as part:
                shutil.copyfileobj(part, whole, 1 << 20)
    write_index(folder / "whole.idx", np.concatenate(lengths), dtype=np.dtype(dtype))
    return largest


def _all(
    pool: ProcessPoolExecutor,
    work: Callable[..., None],
    tasks: Sequence[tuple],
    *,
    label: str,
    sizes: Sequence[int],
) -> None:
    """Run `work` on every task in the pool, moving a bar by `sizes` [groups]; task[1] is the group."""
    with _progress() as bar:
        moving = bar.add_task(label, total=sum(sizes[task[1]] for task in tasks))
        futures = {pool.submit(work, *task): task[1] for task in tasks}
        for future in as_completed(futures):
            future.result()
            bar.advance(moving, sizes[futures[future]])


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes forked from a server that has imported this once, and has no threads to lose."""
    context = get_context("forkserver")
    context.set_forkserver_preload([corpus_work.__name__])
    pool = ProcessPoolExecutor(workers, context, corpus_work.start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """`folder`, locked while this process builds in it, and removed once the build is done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out: another process builds in {folder}; wait for it, or give another prefix"
            ) from None
        yield
        shutil.rmtree(folder)


def _identity(pieces: list[Piece], vocab_size: int) -> str:
    """Changes when a file was added, removed or written to."""
    state = hashlib.sha256(json.dumps([_FORMAT, vocab_size]).encode())
    for piece in pieces:
        state.update(repr(astuple(piece)).encode(errors="replace"))
    return state.hexdigest()


def _continue_or_begin(folder: Path, identity: str) -> None:
    """Keep what a killed build of the same files left in `folder`; empty it where the files are others."""
    mark = folder / "identity"
    if mark.exists() and mark.read_text(encoding="utf-8") == identity:
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    write_text(mark, identity)


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists()
