"""Every layout draws the noise of one process, key by key: the law that a gradient's error cannot state.

Under tensor parallelism a key that is off by one moves a gradient by 2.5% where 3% are allowed and a wrong
draw makes 4.9% (agreement.py); as keys, one is in the set or it is not. The ranks' shards together are the
whole operand, element by element, so none is drawn in another's place.
"""

from __future__ import annotations

import pytest
from agreement import SMALL

STEPS = 2
RECIPE = ["precision=mxfp4_rht_sr", "train.global_batch=4"]
# Ranks, overrides, and of how many linears and microbatches a rank draws the keys.
LAYOUTS = {
    "TP 2": (2, ["parallel.tensor=2"], 16, 2),
    "TP 2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"], 16, 2),
    "PP 2": (2, ["parallel.pipeline=2"], 8, 2),
    "PP 2 interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 8, 2),
    "DP 2": (2, [], 16, 1),
    "recompute": (1, ["parallel.recompute=full"], 16, 2),
}

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_one_processs_keys(ranks, layout: str) -> None:
    run = [*SMALL, *RECIPE]
    single = ranks.run("noise_tasks.keys", run, size=1, steps=STEPS)
    size, parallel, linears, microbatches = LAYOUTS[layout]
    found = ranks.run("noise_tasks.keys", [*run, *parallel], size=size, steps=STEPS)
    # dy twice and x for each microbatch, w once a step
    assert len(single["drawn"]) == 16 * (3 * 2 + 1) * STEPS
    assert all(whole for *_, whole in single["drawn"])
    assert found["drawn"] == single["drawn"]
    assert found["mine"] == linears * (3 * microbatches + 1) * STEPS


def test_parts_of_the_projections_draw_one_processs_keys_too(ranks) -> None:
    """Each part is a matrix of its own, rows and columns counted within it over all ranks."""
    run = [*SMALL, *RECIPE, "model.kv_channels=64"]
    run += ["precision.rules.qk.recipe=mxfp4_sr", "precision.rules.qk.linears=[q,k]"]
    single = ranks.run("noise_tasks.keys", run, size=1, steps=STEPS)
    found = ranks.run("noise_tasks.keys", [*run, *LAYOUTS["TP 2 + SP"][1]], size=2, steps=STEPS)
    assert len(single["drawn"]) == (16 + 4) * (3 * 2 + 1) * STEPS
    assert all(whole for *_, whole in single["drawn"])
    assert found["drawn"] == single["drawn"]
