"""The doctor's self-tests pass on sound backends and name what a planted fault breaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import COVERING
from torch import Tensor

from fp4pretrain import selftests
from fp4pretrain.config import compose, plan_of
from fp4pretrain.ops import Cast
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import Recipe

CPU = torch.device("cpu")


def recipe_of(name: str) -> Recipe:
    return plan_of(compose([f"precision={name}"])).recipe


@pytest.mark.parametrize("name", COVERING)
def test_the_reference_passes_for_every_shipped_recipe(name: str) -> None:
    backend, recipe = ReferenceBackend(), recipe_of(name)
    for test in (selftests.stochastic_rounding, selftests.rotation):
        outcome = test(backend, recipe, CPU)
        assert outcome.good, outcome


class Faulty(ReferenceBackend):
    """Casts as ``change`` alters them."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def quantize(self, x: Tensor, casts: Sequence[Cast], *how: Any, **named: Any) -> list:
        return super().quantize(x, [self.change(cast) for cast in casts], *how, **named)


def one_key(cast: Cast) -> Cast:
    from fp4pretrain.numerics import Noise

    return cast.drawn(Noise(5), cast.signs) if cast.noise is not None else cast


def few_keys(cast: Cast) -> Cast:
    """Two draws where 64 are asked for: their mean keeps half of the noise."""
    from dataclasses import replace

    if cast.noise is None:
        return cast
    return cast.drawn(replace(cast.noise, key=cast.noise.key % 2), cast.signs)


def unturned(cast: Cast) -> Cast:
    from dataclasses import replace

    return replace(cast, signs=None)


@pytest.mark.parametrize(
    "change, test, said",
    [
        (one_key, selftests.stochastic_rounding, "two keys round alike"),
        (few_keys, selftests.stochastic_rounding, "a bias"),
        (unturned, selftests.rotation, "rotates otherwise"),
    ],
)
def test_a_fault_is_named_with_a_cure(change: Any, test: Any, said: str) -> None:
    outcome = test(Faulty(change), recipe_of("nvfp4"), CPU)
    assert not outcome.good and said in outcome.found and outcome.cure


def test_a_full_disk_and_a_nameless_machine_have_cures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftests, "_ROOM_GIB", 1e9)
    assert not selftests.disk(tmp_path).good and selftests.disk(tmp_path).cure

    def nowhere(name: str) -> str:
        raise OSError("unknown host")

    monkeypatch.setattr(selftests.socket, "gethostbyname", nowhere)
    assert "--local-addr" in selftests.collectives(CPU).cure


def test_a_test_that_raises_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ReferenceBackend):
        def quantize(self, *args: Any, **kwargs: Any) -> list:
            raise RuntimeError("no such instruction\nmore")

    found = {one.name: one for one in selftests.self_tests(Broken(), recipe_of("nvfp4"), CPU)}
    assert found["stochastic rounding"].found == "no such instruction"
    assert found["disk"].name == "disk" and "wandb" in found
