"""Two GPUs on NCCL equal one GPU: the law of ``tests/dist`` with real collectives and streams."""

from __future__ import annotations

import pytest
import torch
from agreement import SMALL, STEPS, agree, other_sums, single

NEAREST = ["precision.dgrad.dy.rounding=nearest", "precision.wgrad.dy.rounding=nearest"]
RECIPES = {
    "bf16": ["precision=bf16"],
    "fp8": ["precision=fp8"],
    "fp8 reference": ["precision=fp8", "precision.backend=reference"],
    "nvfp4 nearest": ["precision=nvfp4", *NEAREST],
    "nvfp4": ["precision=nvfp4"],
    "mxfp4_h16": ["precision=mxfp4_h16"],
}
LAYOUTS = {
    "TP 2": ["parallel.tensor=2"],
    "TP 2 + SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP 2": ["parallel.pipeline=2"],
    "PP 2 interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "DP 2": [],
}

# NCCL puts one rank on a GPU
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_equal_one(gpu_ranks, layout: str, recipe: str) -> None:
    overrides = SMALL + RECIPES[recipe]
    reference = single(gpu_ranks, overrides)
    reply = gpu_ranks.run("first_steps", overrides + LAYOUTS[layout], size=2, steps=STEPS)
    # Splitting k over ranks is the only change of a sum; cuBLAS keeps its order for equal shapes.
    splits_sums = "parallel.tensor=2" in LAYOUTS[layout]
    allowing = None
    if recipe == "fp8" and splits_sums:
        allowing = other_sums(reference, single(gpu_ranks, SMALL + RECIPES["fp8 reference"]))
    agree(reply, reference, recipe=recipe, splits_sums=splits_sums, allowing=allowing)
