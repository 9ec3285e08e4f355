"""Layouts of four and eight ranks, of three dimensions too, equal one process: minutes, ``make chaos``."""

from __future__ import annotations

from dataclasses import replace

import pytest
from agreement import STEPS, agree, allowed, nudge, single
from grid import LAYOUTS, MODEL, fitting

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.long]
_nudged: dict[tuple, float] = {}
RUN = [*MODEL, "optim.params_dtype=fp32"]


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "nvfp4", "mxfp4_h16"])
@pytest.mark.parametrize("layout", fitting(8))
def test_sharded_equals_single(ranks, layout: str, recipe: str) -> None:
    one, run = LAYOUTS[layout], [*RUN, f"precision={recipe}"]
    reference = single(ranks, run)
    reply = ranks.run("first_steps", [*run, *one.overrides], size=one.ranks, steps=STEPS)
    allowing = allowed(recipe, splits_sums=one.splits_sums)
    if one.splits_sums:
        deep = max(allowing.gradient, nudged(ranks, recipe, run, reference))
        allowing = replace(allowing, gradient=deep)
    agree(reply, reference, recipe=recipe, splits_sums=one.splits_sums, allowing=allowing)


def nudged(ranks, recipe: str, run: list[str], reference: dict) -> float:
    key = (id(ranks), recipe)
    if key not in _nudged:
        _nudged[key] = nudge(ranks, run, reference)
    return _nudged[key]
