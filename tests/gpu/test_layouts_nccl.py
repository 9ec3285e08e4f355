"""Two GPUs on NCCL equal one GPU: the law of ``tests/dist`` with real collectives and streams."""

from __future__ import annotations

import pytest
import torch
from agreement import GRADIENT, SAME_LOSS, SMALL, STEPS, agree, gradient_error, losses, single

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
    first, gradient = SAME_LOSS, None
    if recipe == "fp8" and splits_sums:
        # FP8 tensor cores hold about 14 bits of a sum, so where k is split y moves by 2^-12 and not by
        # 2^-24, and casts make a step of their format of that: as much as from FP32 sums to theirs.
        # A wrong scale of a few percent could hide in that; "fp8 reference" has nowhere to hide it.
        # Where auto found no such cores both are the reference, and nothing is allowed for them.
        fp32_sums = single(gpu_ranks, SMALL + RECIPES["fp8 reference"])
        moved = abs(losses(reference)[0] / losses(fp32_sums)[0] - 1)
        turned = gradient_error(reference, fp32_sums)
        first, gradient = max(SAME_LOSS, 4 * moved), max(GRADIENT["fp8"], 2 * turned)
        print(f"of other sums: first loss {moved:.1e}, gradient {turned:.1e}")
    agree(reply, reference, recipe=recipe, splits_sums=splits_sums, first=first, gradient=gradient)
