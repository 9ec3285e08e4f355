"""Laws of the datasets: a seed decides, splits share nothing, blends keep weights, caches hold."""

from __future__ import annotations

import ast
import contextlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from fp4pretrain.data.build import stdlib_corpus
from fp4pretrain.data.datasets import build_datasets
from fp4pretrain.data.indexed import read_index
from fp4pretrain.data.spec import DataSpec
from fp4pretrain.data.tokenizers import ByteTokenizer
from fp4pretrain.errors import UserError

MakeDataset = Callable[..., str]


def build(spec: DataSpec, *samples: int, is_builder: bool = True) -> list[Any]:
    train, valid, test = (*samples, 0, 0, 0)[:3]
    return list(
        build_datasets(
            spec, samples=(train, valid, test), is_builder=is_builder, barrier=lambda: None
        )
    )


def tokens_of(dataset: Any, count: int) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


@pytest.fixture
def spec(make_dataset: MakeDataset, tmp_path: Path) -> DataSpec:
    """50 documents of 41 tokens: 30 train (1230 tokens), 10 validation, 10 test (410 each)."""
    cache = str(tmp_path / "cache")
    return DataSpec(path=make_dataset(), split="6,2,2", seq_length=32, seed=3, cache_dir=cache)


def test_sample_is_next_token_prediction(spec: DataSpec) -> None:
    (train, _, _) = build(spec, 5)
    sample = train[0]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert {key: (value.dtype, value.shape) for key, value in sample.items()} == {
        "tokens": (torch.int64, (32,)),
        "labels": (torch.int64, (32,)),
        "loss_mask": (torch.float32, (32,)),
        "position_ids": (torch.int64, (32,)),
    }
    assert torch.equal(sample["position_ids"], torch.arange(32))
    assert sample["loss_mask"].all()


def test_splits_share_no_document(spec: DataSpec) -> None:
    """Document i holds the id i only; all of each split is read, several epochs over."""
    datasets = build(spec, 100, 50, 50)
    seen = [set(tokens_of(one, len(one)).unique().tolist()) - {256} for one in datasets]
    assert seen == [set(range(30)), set(range(30, 40)), set(range(40, 50))]


def test_unasked_splits_are_none(spec: DataSpec) -> None:
    assert [one is None for one in build(spec, 5, 0, 5)] == [False, True, False]


@pytest.mark.parametrize("mock", [False, True], ids=["files", "mock"])
def test_seed_decides_the_order(spec: DataSpec, tmp_path: Path, mock: bool) -> None:
    spec = replace(spec, mock=mock)
    first = tokens_of(build(spec, 30)[0], 30)
    again = replace(spec, cache_dir=str(tmp_path / "elsewhere"))
    assert torch.equal(first, tokens_of(build(again, 30)[0], 30))
    assert not torch.equal(first, tokens_of(build(replace(spec, seed=4), 30)[0], 30))


@pytest.mark.parametrize("samples", [1, 38, 39, 200, 1000])
def test_serves_what_was_asked(spec: DataSpec, samples: int) -> None:
    """38 samples are one epoch; further epochs serve more, each document as often as the others."""
    (train, _, _) = build(spec, samples)
    assert len(train) >= samples
    counts = tokens_of(train, len(train)).reshape(-1).bincount(minlength=257)[:30]
    assert counts.max() - counts.min() <= 32  # what does not fill a last sample is dropped


def test_blend_keeps_its_weights_throughout(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Ids below 100 are of a, the others of b: every run of samples has them 3 to 1."""
    blend = {
        "a": {"prefix": make_dataset("a"), "weight": 6},
        "b": {"prefix": make_dataset("b", first=100, documents=80), "weight": 2},
    }
    spec = DataSpec(blend, split="8,2", seq_length=32, cache_dir=str(tmp_path / "cache"))
    train, valid, _ = build(spec, 400, 40)
    for dataset, count in ((train, 400), (valid, 40)):
        assert len(dataset) == count
        of_b = (tokens_of(dataset, count)[:, 0:2].min(dim=1).values >= 100).double()
        drift = of_b.cumsum(0) - 0.25 * torch.arange(1, count + 1)
        assert drift.abs().max() <= 1


def test_blend_member_errors_name_the_member(make_dataset: MakeDataset, tmp_path: Path) -> None:
    blend = {
        "a": {"prefix": make_dataset("a"), "weight": 1},
        "b": {"prefix": make_dataset("b", documents=5, length=3), "weight": 1},
    }
    spec = DataSpec(blend, split="6,4", seq_length=32, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="data.path.b: 12 training tokens"):
        build(spec, 5)


def test_indices_are_built_once(spec: DataSpec) -> None:
    build(spec, 30, 10)
    before = {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")}
    build(spec, 30, 10)
    assert {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")} == before
    assert not list(spec.cache.rglob(".building-*"))


def test_rebuilt_dataset_is_not_read_by_old_indices(
    spec: DataSpec, make_dataset: MakeDataset
) -> None:
    """megatron-core alone keys its cache by the path and would serve the old order."""
    build(spec, 30)
    make_dataset(documents=60, length=20, first=100)
    (train, _, _) = build(spec, 30)
    assert set(tokens_of(train, 30).unique().tolist()) <= {256, *range(100, 136)}


def test_builders_may_race(spec: DataSpec) -> None:
    """Runs of a sweep start together: all must read the same whole indices."""
    results: list[torch.Tensor] = []
    build(replace(spec, seed=99), 5)  # imports done, so that the threads meet
    threads = [
        threading.Thread(target=lambda: results.append(tokens_of(build(spec, 30)[0], 30)))
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
    with pytest.raises(UserError, match="data.cache_dir: .* not visible on every rank"):
        build(spec, 5, is_builder=False)
    with pytest.raises(UserError, match="data.cache_dir: .* not visible on every rank"):
        build(replace(spec, path=None), 5, is_builder=False)


def test_unwritable_cache(spec: DataSpec, tmp_path: Path) -> None:
    spec.cache.mkdir()
    (spec.cache / "indices").write_text("in the way")
    with pytest.raises(UserError, match="data.cache_dir: cannot write in .*indices"):
        build(spec, 5)


def test_mock_reads_and_writes_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    spec = DataSpec("nowhere", seq_length=64, cache_dir=str(cache), mock=True, vocab_size=1000)
    train, valid, _ = build(spec, 300, 300)
    assert not cache.exists()
    drawn = tokens_of(train, 300)
    assert drawn.min() >= 0
    assert 990 < drawn.max() < 1000
    assert abs(drawn.double().mean() - 499.5) < 4 * 1000 / np.sqrt(12 * drawn.numel())
    assert not torch.equal(train[0]["tokens"], valid[0]["tokens"])
    assert torch.equal(train[0]["tokens"][1:], train[0]["labels"][:-1])


def test_mock_samples_share_no_stretch() -> None:
    """Of a billion ids hardly one comes twice, unless the samples' random streams overlap."""
    spec = DataSpec(seq_length=64, mock=True, vocab_size=10**9)
    drawn = tokens_of(build(spec, 50)[0], 50)
    assert drawn.unique().numel() >= drawn.numel() - 2


def test_stdlib_corpus_is_source_and_built_once(tmp_path: Path) -> None:
    spec = DataSpec(seq_length=512, cache_dir=str(tmp_path))
    train, valid, _ = build(spec, 10, 10)
    prefix = stdlib_corpus(spec.cache, ByteTokenizer(), build=False)
    written = {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")}
    build(spec, 10, 10)
    assert {file: file.stat().st_mtime_ns for file in spec.cache.rglob("*")} == written
    assert len(train) * 512 > 5_000_000
    assert len(valid) > 100
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
    datasets = build_datasets(spec, samples=(30, 10, 0), is_builder=rank == 0, barrier=dist.barrier)
    torch.save([tokens_of(one, 10) for one in datasets if one is not None], f"{folder}/{rank}.pt")
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
    # Forked children have the imports already.
    start_processes(_one_rank, (str(tmp_path), spec), nprocs=2, start_method="fork")
    shutil.rmtree(spec.cache)
    alone = [tokens_of(one, 10) for one in build(spec, 30, 10) if one is not None]
    for rank in range(2):
        theirs = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(alone, theirs, strict=True))
