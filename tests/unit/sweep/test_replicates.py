"""Replicates that differ in the order of sums read the same sequences and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp4pretrain.config import compose
from fp4pretrain.data.batches import MicrobatchSampler
from fp4pretrain.errors import UserError
from fp4pretrain.sweep import Outcome, replicates
from fp4pretrain.sweep.planning import Planned


def test_another_order_of_sums_is_the_same_microbatches_in_another_order() -> None:
    def first(rotate: int) -> list[list[int]]:
        sampler = MicrobatchSampler(
            consumed_samples=8, micro_batch=4, dp_rank=1, dp_size=2, rotate=rotate
        )
        iterator = iter(sampler)
        return [next(iterator) for _ in range(3)]

    plain, rotated = first(0), first(3)
    assert plain[0] == [12, 13, 14, 15]
    assert rotated[0] == [15, 12, 13, 14]
    assert [sorted(one) for one in rotated] == plain


def test_replicates_differ_in_one_thing_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def train_all(sweep: list[list[str]], *, compared: bool) -> list[Outcome]:
        seen.extend(sweep)
        runs = [Planned(compose([f"run_dir={tmp_path / str(n)}"])) for n in range(len(sweep))]
        return [Outcome(run, "", "finished") for run in runs]

    monkeypatch.setattr(replicates, "train_all", train_all)
    found = replicates.train_replicates(
        ["seed=7", "precision=fp8"], replicates=3, out=tmp_path / "noise"
    )
    assert {level: [int(path.name) for path in paths] for level, paths in found.items()} == {
        "sums": [0, 1, 2],
        "data": [0, 3, 4],
        "weights": [0, 5, 6],
    }
    shaped = []
    for overrides in seen:
        config = compose(overrides)
        assert config.resume == "auto"
        shaped.append((config.seed, config.data.seed, config.train.sum_order))
    first, sums, data, weights = shaped[0], shaped[1:3], shaped[3:5], shaped[5:]
    assert first == (7, 7, 0)
    assert sums == [(7, 7, 1), (7, 7, 2)]
    assert data == [(7, 8, 0), (7, 9, 0)]
    assert weights == [(8, 7, 0), (9, 7, 0)]


@pytest.mark.parametrize(
    ("overrides", "count", "says"),
    [
        (["run_dir=x"], 3, "run_dir: noise sets it"),
        (["train.sum_order=1"], 3, "train.sum_order: noise sets it"),
        ([], 1, "replicates: 1 show no spread"),
        (["train.micro_batch=2"], 3, "train.micro_batch: 2 sequences have fewer orders than 3"),
    ],
)
def test_what_shows_no_noise_is_refused(
    tmp_path: Path, overrides: list[str], count: int, says: str
) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        replicates.train_replicates(overrides, replicates=count, out=tmp_path)


def test_an_order_of_sums_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"^train.sum_order: 4 is no other order of 4 sequences"):
        compose(["train.sum_order=4", "train.micro_batch=4"])
