"""A checkpoint written from GPUs: loaded on another layout it is the same state, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from agreement import LATER_LOSS, SMALL
from records import same_state, weights

from fp4pretrain.config import compose
from fp4pretrain.train.main import train

STEPS = 2
RUN = [*SMALL, "precision=nvfp4", "train.global_batch=4"]
LAYOUTS = {
    "1": (1, []),
    "TP 2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP 2": (2, ["parallel.pipeline=2"]),
    "DP 2": (2, []),
}


@pytest.mark.parametrize(
    ("source", "target"), [("1", "1"), ("1", "TP 2 + SP"), ("DP 2", "PP 2"), ("PP 2", "1")]
)
def test_a_checkpoint_goes_on(gpu_ranks, source: str, target: str) -> None:
    if torch.cuda.device_count() < max(LAYOUTS[source][0], LAYOUTS[target][0]):
        pytest.skip("needs 2 GPUs")  # the pair of one GPU runs; tests/dist holds all pairs on gloo
    size, parallel = LAYOUTS[source]
    saved = gpu_ranks.run("checkpoint_tasks.begin", [*RUN, *parallel], size=size, steps=STEPS)
    size, parallel = LAYOUTS[target]
    run = [*RUN, *parallel, f"resume={saved['checkpoint']}"]
    reply = gpu_ranks.run("checkpoint_tasks.go_on", run, size=size, steps=STEPS)

    assert same_state(Path(saved["checkpoint"]), Path(reply["checkpoint"]))["step"] == STEPS
    rows = zip(reply["rows"], saved["rows"][STEPS:], strict=True)
    gaps = [abs(a["loss"] / b["loss"] - 1) for a, b in rows]
    print(f"{source} -> {target}: losses differ by {max(gaps):.1e}")
    assert max(gaps) <= LATER_LOSS


# On a CPU megatron-core's seeding is ours and reaches the host's generator anyway; that `join` seeds it where
# megatron-core does not is asked without a GPU in `tests/unit/parallel/test_leave.py`.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_run_in_other_processes_holds_the_same_generators(tmp_path: Path) -> None:
    """A restarted run's checkpoint equals the undisturbed one's to the last generator: a new process's
    stands anywhere, as ``torch.seed`` leaves it."""
    held = []
    for name in ("one", "other"):
        torch.seed()
        keys = [
            "train.steps=1",
            "train.deterministic=true",
            "logging=quiet",
            "logging.wandb.mode=disabled",
        ]
        train(compose([*RUN, *keys, f"run_dir={tmp_path / name}"]))
        held.append(weights(tmp_path / name / "checkpoints" / "step_00000001"))
    assert held[0].keys() == held[1].keys()
    assert [key for key in held[0] if not torch.equal(held[0][key], held[1][key])] == []
    assert [key for key in held[0] if key.startswith("rng.")]
