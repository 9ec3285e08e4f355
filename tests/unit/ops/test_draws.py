"""The keys and signs of a captured step are those that each cast would have drawn by itself."""

from __future__ import annotations

import pytest
import torch
from fp4_kernels.spec import draw_words

from fp4pretrain.config import compose, plan_of
from fp4pretrain.numerics import derive_key, derive_keys, random_sign_words, random_signs
from fp4pretrain.ops import Cast, Draws, Moment, Shard, linear_casts
from fp4pretrain.precision import Recipe

CPU = torch.device("cpu")
# never redrawn signs and Transformer Engine's; signs anew each step and each GEMM; stochastic weights
RECIPES = ("nvfp4", "mxfp4_rht_sr", "quartet2", "tetrajet2")
SHARD = Shard("column", n=(32, 0, 0), split=True)


def test_many_keys_at_once_are_the_keys_one_by_one() -> None:
    paths = [(0, -1, 5), (3, 7, -1), (1 << 40, 2, 9)]
    columns = torch.tensor(paths).unbind(1)
    got = derive_keys(1234, 1, 17, *columns)
    want = [derive_key(1234, 1, 17, *path) for path in paths]
    assert [int(key) % (1 << 64) for key in got] == want


@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_many_signs_at_once_are_the_signs_one_by_one(size: int) -> None:
    keys = derive_keys(7, torch.arange(20))
    low, high = random_sign_words(keys, size)
    for index, key in enumerate(keys.tolist()):
        words = draw_words(0, random_signs(key % (1 << 64), size))
        assert (int(low[index]), int(high[index])) == words[1:3]


def casts_of(recipe: Recipe, moment: Moment) -> list[Cast]:
    return [
        cast
        for linear in (0, 3)
        for cast in linear_casts(recipe, moment, SHARD, layer=2, linear=linear).all().values()
    ]


def recipe_of(name: str) -> Recipe:
    return plan_of(compose([f"precision={name}", "model.num_layers=16"])).recipe.interned()


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_a_step_hold_what_its_casts_would_draw(name: str) -> None:
    recipe, draws = recipe_of(name), Draws(CPU)

    def step(number: int) -> list[Cast]:
        return [c for m in (0, 1) for c in casts_of(recipe, Moment(9, number, m, draws))]

    def plain(number: int) -> list[Cast]:
        return [c for m in (0, 1) for c in casts_of(recipe, Moment(9, number, m))]

    rehearsed = step(4)
    assert len(draws) > 0
    check(rehearsed, plain(4))
    draws.begin()
    captured = step(5)
    # a later step is worked out ahead, or not
    for number, ahead in ((5, False), (11, True), (12, False)):
        if ahead:
            draws.prepare(9, number)
        draws.fill(9, number)
        check(captured, plain(number))


def check(drawn: list[Cast], wanted: list[Cast]) -> None:
    """Every cast that draws has a row, with the key and signs of the cast that stands alone."""
    for cast, want in zip(drawn, wanted, strict=True):
        if cast.draw is None:
            assert want.noise is None and cast == want  # signs that never change are arguments
            continue
        key = want.noise.key if want.noise is not None else None
        words = draw_words(key or 0, want.signs)
        assert tuple(cast.draw[1:3].tolist()) == words[1:3]
        if key is not None:
            assert int(cast.draw[0]) == words[0]


def test_a_step_that_casts_otherwise_than_the_rehearsed_one_is_an_error() -> None:
    recipe = recipe_of("nvfp4")
    draws = Draws(CPU)
    casts_of(recipe, Moment(9, 0, 0, draws))
    draws.begin()
    with pytest.raises(RuntimeError, match="is not the rehearsed one"):
        casts_of(recipe, Moment(9, 1, 1, draws))
    draws = Draws(CPU)
    casts_of(recipe, Moment(9, 0, 0, draws))
    draws.begin()
    with pytest.raises(RuntimeError, match="asked for 0 draws of"):
        draws.begin()
