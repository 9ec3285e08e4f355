"""What observers say of a step is the same on every layout: sums over ranks, whole tensors' scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agreement import SMALL

LAYOUTS = {
    "TP 2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP 2 interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "TP 2 x DP 2": (4, ["parallel.tensor=2"]),
}
RUN = [
    *SMALL,
    "precision=nvfp4",
    "precision.keep.last_blocks=0",
    "train.steps=1",
    "observe.interval=1",
    "observe.statistics=[sqnr,cosine,underflow,saturation,kurtosis,crest,amax_spread,scales,draws,"
    "gradient_noise]",
    "logging=quiet",
    "checkpoint.at_end=false",
    "train.eval_interval=0",
]
pytestmark = pytest.mark.xdist_group("ranks")


def observed(ranks: Any, path: Path, how: list[str], *, size: int) -> dict[str, dict[str, float]]:
    """Statistic -> site -> number of the first step."""
    ranks.run("train", [*RUN, *how, f"run_dir={path}"], size=size)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row["observed"] for row in rows if row["event"] == "observe"]
    scales = row.pop("scales")
    sites = row.pop("sites")
    found = {name: dict(zip(sites, values, strict=True)) for name, values in row.items()}
    top = [max(one.values()) for one in scales]  # the largest share of an octave
    return {**found, "scales": dict(zip(sites, top, strict=True))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_observations_are_those_of_one_process(ranks: Any, tmp_path: Path, layout: str) -> None:
    """But for sums that tensor parallelism splits, which move a value across a boundary here and there."""
    size, how = LAYOUTS[layout]
    alone = observed(ranks, tmp_path / "alone", [], size=1)
    found = observed(ranks, tmp_path / "ranks", how, size=size)
    assert found.keys() == alone.keys()
    for name, values in alone.items():
        assert found[name].keys() == values.keys()
        for site, value in values.items():
            other = found[name][site]
            assert (other is None) == (value is None), (name, site)
            if value is not None:
                assert other == pytest.approx(value, rel=0.05, abs=0.004), (name, site)
