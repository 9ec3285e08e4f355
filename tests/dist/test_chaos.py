"""Nothing is lost: a run whose ranks are killed again and again ends as one that never was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from chaos import MOMENTS, RUN, Chaos
from records import curve, weights

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize(
    ("size", "layout", "kills"),
    [
        (2, ["parallel.tensor=2", "parallel.sequence=true"], 2),
        pytest.param(4, ["parallel.tensor=2"], 30, marks=pytest.mark.long),
    ],
    ids=["TP 2 + SP, 2 kills", "TP 2 x DP 2, 30 kills"],
)
def test_killed_again_and_again_equals_undisturbed(
    ranks, tmp_path: Path, size: int, layout: list[str], kills: int
) -> None:
    """Rows, weights and optimizer state, bit for bit, with stochastic rounding; and after each kill
    the newest checkpoint is whole and what it should be."""
    steps = 6 * (kills + 1)
    run = [*RUN, *layout, f"train.steps={steps}"]
    whole = tmp_path / "whole"
    ranks.run("train", [*run, f"run_dir={whole}", f"checkpoint.keep_last={steps}"], size=size)

    chaos = Chaos(tmp_path / "run", whole, size=size, seed=kills)
    begun = time.monotonic()
    chaos.train(run, moments=[MOMENTS[(i + 1) % len(MOMENTS)] for i in range(kills)])
    print(f"{chaos.summary()}; {time.monotonic() - begun:.0f} s")

    assert len(chaos.kills) == kills
    resumed = {kill.kept for kill in chaos.kills} - {0}
    assert len(resumed) > kills / 2, "most kills came before there was anything to go on from"
    assert curve(chaos.run) == curve(whole)
    last = f"checkpoints/step_{steps:08d}"
    one, other = weights(whole / last), weights(chaos.run / last)
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]
    assert chaos.left_over() == []
    kept = sorted(path.name for path in (chaos.run / "checkpoints").iterdir())
    assert kept == ["latest", f"step_{steps - 2:08d}", f"step_{steps:08d}"]
