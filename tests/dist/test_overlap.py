"""Weights that are gathered beside the forward pass are those that an update gathers at its end.

On GPUs alone runs overlap so (gloo would take the CPU's cores); here two ranks on gloo are told to.
"""

from __future__ import annotations

from pathlib import Path

import torch
from records import curve, weights

RUN = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.ffn_hidden_size=96",
    "model.seq_length=32", "train.micro_batch=1", "train.global_batch=4", "train.steps=9", "data.mock=true",
    "data.valid_tokens=128", "train.log_interval=1", "train.eval_interval=3", "checkpoint.interval=4",
    "checkpoint.keep_last=9", "optim.lr=0.01", "optim.warmup=1", "logging=quiet",
    "logging.wandb.mode=disabled", "precision=nvfp4", "precision.deoscillation.period=3",
]  # fmt: skip


def test_a_run_that_gathers_weights_beside_the_forward_pass_is_the_same_run(
    ranks, tmp_path: Path
) -> None:
    """With evaluations, checkpoints, a restart and weights that are set between steps."""
    folders = tmp_path / "plain", tmp_path / "overlapped"
    ranks.run("train", [*RUN, f"run_dir={folders[0]}"], size=2)
    keys = [*RUN, f"run_dir={folders[1]}"]
    first = ranks.run("overlap_tasks.overlapped", [*keys, "train.steps=9"], size=2)
    for number in (4, 8, 9):
        step = f"checkpoints/step_{number:08d}"
        one, other = weights(folders[0] / step), weights(folders[1] / step)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), number
    assert curve(folders[1]) == curve(folders[0])
    (folders[1] / "checkpoints/latest").write_text("step_00000004\n")
    again = ranks.run("overlap_tasks.overlapped", [*keys, "resume=auto"], size=2)
    assert curve(folders[1]) == curve(folders[0])
    # every step's forward pass gathers, and so do deoscillation (each step) and evaluations after it
    assert first["ahead"] >= 9 and first["between"] >= 9 and again["ahead"] >= 5
