"""Casts are prepared once a linear and drawn anew each call: the same as made from nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp4pretrain.config import compose, plan_of
from fp4pretrain.ops import Moment, Shard, casts, linear_casts

RECIPES = {
    "nvfp4": ["precision=nvfp4"],
    "signs a layer": ["precision=nvfp4", "precision.wgrad.rotation.signs=seed",
                      "precision.wgrad.rotation.resample=layer"],
    "signs a GEMM": ["precision=mxfp4_rht_sr"],
    "no draws": ["precision=fp8"],
}  # fmt: skip
SHARDS = (Shard("column", n=(64, 32, 96)), Shard("row", k=(128, 0, 0)))
MOMENTS = [(s, m, layer) for s in (0, 1) for m in (0, 3) for layer in (0, 2)]


@pytest.mark.parametrize("name", RECIPES)
def test_prepared_casts_are_those_made_from_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = plan_of(compose(RECIPES[name])).recipe
    monkeypatch.setattr(casts, "_PREPARED", {})
    seen = set()
    for shard in SHARDS:
        for step, microbatch, layer in (*MOMENTS, *MOMENTS):
            moment = Moment(5, step, microbatch)
            made = linear_casts(recipe, moment, shard, layer=layer, linear=1)
            fresh = casts._prepare(recipe, moment, shard, (layer, 1), global_amax=True).casts
            assert made == fresh
            seen.add(made)
    # one entry a linear and shard, however many moments
    assert len(casts._PREPARED) == len(SHARDS) * len({layer for *_, layer in MOMENTS})
    draws = len(MOMENTS) if name != "no draws" else 1
    assert len(seen) == len(SHARDS) * draws or name == "no draws"


def test_draws_of_a_cast_are_of_one_kind_and_equal_a_replaced_one() -> None:
    recipe = plan_of(compose(["precision=mxfp4_rht_sr"])).recipe
    drawn = [linear_casts(recipe, Moment(1, step, 0), SHARDS[0]).wgrad_dy for step in range(3)]
    assert len(set(drawn)) == 3
    assert len({cast.kind for cast in drawn}) == 1
    first, last = drawn[0], drawn[-1]
    assert first.drawn(last.noise, last.signs) == last
    assert replace(first, transpose=False).kind != first.kind
