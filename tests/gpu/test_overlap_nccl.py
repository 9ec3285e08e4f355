"""Two GPUs' runs that overlap, captured or not, are the run that waits and is launched by the host.

Weights are gathered beside the next forward pass, steps begin before the one before is read, collectives are
replayed; evaluations, checkpoints and their gathering come in between.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from records import curve, weights

RUN = [
    "data.mock=true", "train.steps=10", "train.micro_batch=4", "train.global_batch=16", "logging=quiet",
    "train.eval_interval=4", "data.valid_tokens=2048", "model.seq_length=128", "checkpoint.interval=5",
    "train.deterministic=true", "precision=nvfp4", "logging.wandb.mode=disabled",
]  # fmt: skip
RUNS = {
    "DP 2": [],
    "DP 2, biases, LayerNorm": ["model.bias=true", "model.normalization=layernorm"],
    "TP 2 + SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP 2": ["parallel.pipeline=2"],
}

# NCCL puts one rank on a GPU
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


@pytest.mark.parametrize("name", RUNS)
def test_overlapped_runs_have_the_bits_of_a_run_that_waits(
    gpu_ranks, name: str, tmp_path: Path
) -> None:
    ways = {
        "waits": ["parallel.overlap=false", "train.graph=never"],
        **({"plain": ["train.graph=never"]} if name.startswith("DP") else {}),
        "captured": ["train.graph=always"],
    }
    for way, keys in ways.items():
        run = [*RUN, *RUNS[name], *keys, f"run_dir={tmp_path / way}"]
        gpu_ranks.run("train", run, size=2)
    for way in list(ways)[1:]:
        assert curve(tmp_path / way) == curve(tmp_path / "waits")
        for step in (5, 10):
            last = f"checkpoints/step_{step:08d}"
            one, other = weights(tmp_path / "waits" / last), weights(tmp_path / way / last)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
