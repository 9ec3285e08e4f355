"""Laws of blends: shares, epochs and caps of several datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_lab import build, held_out, predicted, same, tokens_of

from fp4pretrain.data.spec import DataSpec, validate
from fp4pretrain.errors import UserError

MakeDataset = Callable[..., str]


def test_blend_keeps_its_weights_throughout(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Ids below 100 are of a, the others of b: every run of samples has them 3 to 1."""
    blend = {
        "a": {"prefix": make_dataset("a"), "weight": 6},
        "b": {"prefix": make_dataset("b", first=100, documents=80), "weight": 2},
    }
    spec = DataSpec(blend, split="6,4", seq_length=32, cache_dir=str(tmp_path / "cache"))
    data = build(spec, 400)
    of_b = (tokens_of(data.train, 400)[:, 0:2].min(dim=1).values >= 100).double()
    drift = of_b.cumsum(0) - 0.25 * torch.arange(1, 401)
    assert drift.abs().max() <= 1
    valid = predicted(held_out(data))
    share = ((valid >= 100) & (valid < 256)).double().mean()
    assert share == pytest.approx(0.25 * 40 / 41, abs=0.05)


@pytest.fixture
def blend(make_dataset: MakeDataset, tmp_path: Path) -> Callable[..., DataSpec]:
    """Ids 0 to 49 are a's, 100 to 179 are b's, 200 to 219 are c's."""
    prefixes = {
        "a": make_dataset("a"),
        "b": make_dataset("b", first=100, documents=80),
        "c": make_dataset("c", first=200, documents=20),
    }

    def made(**said: dict[str, Any]) -> DataSpec:
        path = {name: {"prefix": prefixes[name], **more} for name, more in said.items()}
        return DataSpec(path, split="6,4", seq_length=32, cache_dir=str(tmp_path / "cache"))

    return made


def origins(train: Any, count: int) -> list[str]:
    """Of which dataset each sample is."""
    first = tokens_of(train, count)[:, 0:2].min(dim=1).values
    return ["abc"[int(one) // 100] for one in first]


def test_capped_datasets_leave_the_rest_to_the_others(blend: Callable[..., DataSpec]) -> None:
    """Each is read up to its cap, in its order; before and behind, the others keep their shares."""
    free = blend(a={"weight": 1}, b={"weight": 1}, c={"weight": 2})
    spec = blend(
        a={"weight": 1}, b={"weight": 1, "max_tokens": 64}, c={"weight": 2, "max_epochs": 1}
    )
    plain, train = build(free).train, build(spec, 90).train
    cap = train.members[2].epoch_samples
    found = origins(train, 90)
    assert (found.count("b"), found.count("c")) == (2, cap)
    last_b, last_c = (89 - found[::-1].index(name) for name in "bc")
    assert origins(plain, last_b + 1) == found[: last_b + 1]
    between = found[last_b + 1 : last_c + 1]
    assert len(between) > 5
    assert abs(between.count("c") - 2 * between.count("a")) <= 2
    assert set(found[last_c + 1 :]) == {"a"}
    mine = [i for i, one in enumerate(found) if one == "c"]
    assert all(
        torch.equal(train[number]["tokens"], train.members[2][i]["tokens"])
        for i, number in enumerate(mine)
    )
    longer = build(spec, 300).train
    assert torch.equal(tokens_of(train, 200), tokens_of(longer, 200))
    assert same(held_out(build(free)), held_out(build(spec)))


def test_epochs_are_how_often_each_is_read(blend: Callable[..., DataSpec]) -> None:
    train = build(blend(a={"epochs": 2}, b={"epochs": 1}, c={"epochs": 0.5})).train
    sizes = [member.epoch_samples for member in train.members]
    wanted = [2 * sizes[0], sizes[1], 0.5 * sizes[2]]
    found = origins(train, round(sum(wanted)))
    for name, count in zip("abc", wanted, strict=True):
        assert abs(found.count(name) - count) <= 1


def test_a_run_beyond_the_caps_is_refused(blend: Callable[..., DataSpec]) -> None:
    one = blend(a={"max_epochs": 2})
    size = build(one).train.members[0].epoch_samples
    train = build(one, 2 * size).train
    whole = build(blend(a={})).train
    assert torch.equal(tokens_of(train, 2 * size), tokens_of(whole, 2 * size))
    with pytest.raises(
        UserError, match=rf"^data\.path: the run reads {2 * size + 1} samples .* {2 * size};"
    ):
        build(one, 2 * size + 1)
    with pytest.raises(UserError, match=r"^data\.path: "):
        train[2 * size]
    with pytest.raises(UserError, match=r"^data\.path\.a: its cap is below one sample of 32"):
        build(blend(a={"max_tokens": 31}, b={}))


def test_caps_are_in_the_digest_and_a_list_is_a_blend(blend: Callable[..., DataSpec]) -> None:
    named = blend(a={}, b={"weight": 3})
    assert isinstance(named.path, dict)
    listed = replace(named, path=[named.path["a"]["prefix"], named.path["b"]])
    assert build(named).digest == build(listed).digest
    assert build(named).digest != build(blend(a={}, b={"weight": 3, "max_epochs": 9})).digest


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"a": {"epochs": 1}, "b": {}}, r"data\.path\.a\.epochs: other members have weights"),
        ({"a": {"epochs": 1, "weight": 1}}, r"data\.path\.a\.epochs: it has a weight too"),
        ({"a": {"max_epochs": 0}}, r"data\.path\.a\.max_epochs: 0 is not above 0"),
        ({"a": {"max_epochs": True}}, r"data\.path\.a\.max_epochs: True is not above 0"),
        (
            {"a": {"max_tokens": "many"}},
            r"data\.path\.a\.max_tokens: 'many' is no number of tokens",
        ),
    ],
)
def test_members_that_cannot_be_meant(
    blend: Callable[..., DataSpec], members: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        validate(blend(**members))


def test_blend_member_errors_name_the_member(make_dataset: MakeDataset, tmp_path: Path) -> None:
    blend = {
        "a": {"prefix": make_dataset("a"), "weight": 1},
        "b": {"prefix": make_dataset("b", documents=10, length=4), "weight": 1},
    }
    spec = DataSpec(blend, split="6,4", seq_length=45, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data.path.b: \d+ training tokens"):
        build(spec)
