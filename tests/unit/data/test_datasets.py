"""Laws of what a run reads: one validation set for all runs, an order that a longer run keeps."""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data_lab import build, held_out, same, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import start_processes

from fp4pretrain.data import order
from fp4pretrain.data.build import stdlib_corpus
from fp4pretrain.data.indexed import read_index, write_dataset
from fp4pretrain.data.spec import DataSpec
from fp4pretrain.data.tokenizers import ByteTokenizer
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.groups import leave

MakeDataset = Callable[..., str]


@pytest.fixture
def spec(make_dataset: MakeDataset, tmp_path: Path) -> DataSpec:
    """50 documents of 41 tokens, about 30 for training, 10 for validation, 10 for tests."""
    cache = str(tmp_path / "cache")
    return DataSpec(path=make_dataset(), split="6,2,2", seq_length=32, seed=3, cache_dir=cache)


def test_sample_is_next_token_prediction(spec: DataSpec) -> None:
    sample = build(spec).train[0]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert {key: (value.dtype, value.shape) for key, value in sample.items()} == {
        "tokens": (torch.int64, (32,)),
        "labels": (torch.int64, (32,)),
        "loss_mask": (torch.float32, (32,)),
        "position_ids": (torch.int64, (32,)),
    }
    assert torch.equal(sample["position_ids"], torch.arange(32))
    assert sample["loss_mask"].all()


def test_padding_of_megatron_core_is_predicted_nowhere(spec: DataSpec, tmp_path: Path) -> None:
    """Ids of -1, which its own tools write for padding, are read as token 0 and masked."""
    index = read_index(str(spec.path))
    Path(f"{spec.path}.json").unlink()  # which is ours
    raw = np.fromfile(f"{spec.path}.bin", dtype=index.dtype).astype(np.int32)
    raw[::5] = -1
    raw.tofile(f"{spec.path}.bin")
    idx = bytearray(Path(f"{spec.path}.idx").read_bytes())
    idx[17] = 4  # int32
    pointers = (index.pointers * (4 // index.dtype.itemsize)).astype("<i8").tobytes()
    begin = 34 + 4 * index.documents
    idx[begin : begin + len(pointers)] = pointers
    Path(f"{spec.path}.idx").write_bytes(idx)
    data = build(spec)
    for sample in (data.train[3], held_out(data)[0]):
        assert sample["tokens"].min() >= 0
        assert 0 < int(sample["loss_mask"].sum()) < 32


@pytest.mark.parametrize("mock", [False, True], ids=["files", "mock"])
def test_seed_decides_the_order(spec: DataSpec, tmp_path: Path, mock: bool) -> None:
    spec = replace(spec, mock=mock, valid_tokens=4096)
    first = build(spec)
    again = build(replace(spec, cache_dir=str(tmp_path / "elsewhere")), 7)
    assert torch.equal(tokens_of(first.train, 30), tokens_of(again.train, 30))
    assert first.digest == again.digest
    other = build(replace(spec, seed=4))
    assert not torch.equal(tokens_of(first.train, 30), tokens_of(other.train, 30))
    assert first.digest != other.digest
    assert same(held_out(first), held_out(other))


@pytest.mark.parametrize("blended", [False, True], ids=["single", "blend"])
@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_a_longer_run_reads_what_a_shorter_one_read(
    spec: DataSpec,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    blended: bool,
    cached: bool,
) -> None:
    """The order is a function of the seed and the epoch, not of the number of samples asked for."""
    if blended:
        other = make_dataset("other", first=100, documents=20)
        spec = replace(spec, path={"a": {"prefix": spec.path}, "b": {"prefix": other, "weight": 2}})
    if cached:
        monkeypatch.setattr(order, "_IN_MEMORY", 0)
    short, long = build(spec, 10).train, build(spec, 300).train
    assert torch.equal(tokens_of(short, 200), tokens_of(long, 200))
    assert torch.equal(tokens_of(short, 9, first=150), tokens_of(short, 200)[150:159])
    if cached and not blended:
        assert len(list(spec.cache.glob("indices/*/epoch_*"))) == -(-300 // short.epoch_samples)


def test_every_epoch_reads_every_document_in_an_order_of_its_own(spec: DataSpec) -> None:
    train = build(spec).train
    epochs = [
        tokens_of(train, train.epoch_samples, first=e * train.epoch_samples) for e in (0, 1, 2)
    ]
    for tokens in epochs:
        counts = tokens.reshape(-1).bincount(minlength=257)[:256]
        assert counts.max() == 40
        # what does not fill a last sample is left out, and the token that is only predicted
        assert counts[counts > 0].sum() >= 40 * (counts > 0).sum() - 33
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.integers(1, 7), st.integers(0, 99))
def test_samples_are_stretches_of_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, seed: int
) -> None:
    """Of any lengths, empty ones too: laid end to end in some order, every stretch once an epoch."""
    folder = tmp_path_factory.mktemp("stretches")
    ids = (np.full(length, i, dtype=np.int64) for i, length in enumerate(lengths))
    prefix = str(folder / "d")
    write_dataset(ids, prefix, tokenizer=ByteTokenizer(), source="a test")
    spec = DataSpec(
        prefix,
        split="1,0,0",
        valid=prefix,
        seq_length=seq_length,
        seed=seed,
        cache_dir=str(folder / "c"),
    )
    if sum(lengths) + len(lengths) < seq_length + 1:
        return
    train = build(spec).train
    opened = train.epoch(0)
    stream = opened.stream.read(0, len(opened.stream))
    assert sorted(opened.stream.order.tolist()) == list(range(len(lengths)))
    expected = np.concatenate(
        [np.append(np.full(lengths[i], i), 256) for i in opened.stream.order.tolist()]
    )
    assert np.array_equal(stream, expected)
    begins = []
    for number in range(train.epoch_samples):
        sample = train[number]
        text = torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy()
        begins.append(int(opened.samples[number]) * seq_length)
        assert np.array_equal(text, stream[begins[-1] : begins[-1] + seq_length + 1])
    assert sorted(begins) == list(range(0, train.epoch_samples * seq_length, seq_length))
    assert train.epoch_samples == (len(stream) - 1) // seq_length


def test_documents_are_read_once(spec: DataSpec) -> None:
    build(spec, 30)
    before = {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")}
    build(replace(spec, seed=9, seq_length=16), 30)
    assert {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")} == before
    assert not list(spec.cache.rglob(".building-*"))


def test_rebuilt_dataset_is_read_anew(spec: DataSpec, make_dataset: MakeDataset) -> None:
    """Nothing in the cache goes by the path alone."""
    before = build(spec).digest
    make_dataset(documents=60, length=20, first=100)
    data = build(spec)
    assert set(tokens_of(data.train, 30).unique().tolist()) <= {256, *range(100, 160)}
    assert data.digest != before


def test_a_copy_elsewhere_is_the_same_data(spec: DataSpec, make_dataset: MakeDataset) -> None:
    """The digests are of the content: no path, no date, no width of the ids."""
    copied = build(replace(spec, path=make_dataset("copied")))
    assert copied.digest == build(spec).digest
    assert same(held_out(copied), held_out(build(spec)))


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "cache"])
def test_builders_may_race(spec: DataSpec, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    """Runs of a sweep start together: all must read the same whole arrays."""
    if cached:
        monkeypatch.setattr(order, "_IN_MEMORY", 0)
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(tokens_of(build(spec, 90).train, 90)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(results[0], other) for other in results)
    assert not list(spec.cache.rglob(".building-*"))


def test_rank_that_sees_no_cache(spec: DataSpec) -> None:
    with pytest.raises(UserError, match=r"data.cache_dir: .* not visible on every rank"):
        build(spec, is_builder=False)
    with pytest.raises(UserError, match=r"data.cache_dir: .* not visible on every rank"):
        build(replace(spec, path=None), is_builder=False)


@pytest.mark.parametrize("taken", ["documents", "indices"])
def test_unwritable_cache(spec: DataSpec, monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    monkeypatch.setattr(order, "_IN_MEMORY", 0)
    spec.cache.mkdir()
    (spec.cache / taken).write_text("in the way")
    with pytest.raises(UserError, match=rf"data.cache_dir: cannot write in .*{taken}"):
        build(spec)


def test_mock_reads_and_writes_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    spec = DataSpec("nowhere", seq_length=64, cache_dir=str(cache), mock=True, vocab_size=1000)
    data = build(replace(spec, valid_tokens=300 * 64))
    train, valid = data.train, held_out(data)
    assert not cache.exists()
    assert (len(valid), valid.tokens) == (300, 300 * 64)
    drawn = tokens_of(train, 300)
    assert drawn.min() >= 0
    assert 990 < drawn.max() < 1000
    assert abs(drawn.double().mean() - 499.5) < 4 * 1000 / np.sqrt(12 * drawn.numel())
    assert not torch.equal(train[0]["tokens"], valid[0]["tokens"])
    assert torch.equal(train[0]["tokens"][1:], train[0]["labels"][:-1])


def test_mock_samples_share_no_stretch() -> None:
    """Of a billion ids hardly one comes twice, unless the samples' random streams overlap."""
    spec = DataSpec(seq_length=64, mock=True, vocab_size=10**9)
    drawn = tokens_of(build(spec).train, 50)
    assert drawn.unique().numel() >= drawn.numel() - 2


def test_stdlib_corpus_is_source_and_built_once(tmp_path: Path) -> None:
    spec = DataSpec(seq_length=512, cache_dir=str(tmp_path))
    data = build(spec)
    prefix = stdlib_corpus(spec.cache, ByteTokenizer(), build=False)
    written = {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")}
    build(spec)
    assert {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")} == written
    assert data.train.epoch_samples * 512 > 5_000_000
    assert len(held_out(data)) > 100
    index = read_index(prefix)
    whole = parsed = 0
    for document in range(100):
        begin, end = index.offset(document), index.offset(document + 1)
        if end - begin > 30_000:  # may be a piece of a longer file
            continue
        whole += 1
        with contextlib.suppress(SyntaxError):  # Python's tests hold broken files on purpose
            ast.parse(ByteTokenizer().decode(index.read(begin, end - 1).tolist()))
            parsed += 1
    assert whole > 50
    assert parsed > 0.9 * whole


def _one_rank(rank: int, folder: str, spec: DataSpec) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = build(spec, 30, is_builder=rank == 0)
    torch.save([tokens_of(one, 10) for one in (data.train, held_out(data))], f"{folder}/{rank}.pt")
    if rank == 1:  # another rank's mistake is everybody's, at once
        spec = replace(spec, tokenizer="bite")
    try:
        build(spec, is_builder=rank == 0)
    except UserError as error:
        Path(folder, f"{rank}.txt").write_text(f"{error} {error.shown}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("blended", [False, True], ids=["single", "blend"])
def test_two_ranks_read_the_same(
    spec: DataSpec, tmp_path: Path, make_dataset: MakeDataset, blended: bool
) -> None:
    """And the same as one process without torch.distributed."""
    if blended:
        other = make_dataset("other", first=100)
        blend = {"a": {"prefix": spec.path}, "b": {"prefix": other, "weight": 2}}
        spec = replace(spec, path=blend)
    leave(destroy=True)  # another test's group: threads do not survive a fork
    # Forked children have the imports already.
    start_processes(_one_rank, (str(tmp_path), spec), nprocs=2, start_method="fork")
    data = build(spec, 30)
    alone = [tokens_of(one, 10) for one in (data.train, held_out(data))]
    for rank in range(2):
        theirs = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(alone, theirs, strict=True))
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all(line.startswith("data.tokenizer: unknown tokenizer 'bite'") for line in said)
    assert "(rank 1 on " in said[0]
    assert [line.rsplit(" ", 1)[1] for line in said] == ["True", "False"]
