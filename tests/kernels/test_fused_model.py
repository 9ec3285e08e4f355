"""A model of fused kernels computes the loss and the gradients of the model without them, sharded too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# All cases of one count of ranks come from one launch: they stay in one worker.
pytestmark = pytest.mark.xdist_group("fused models")
ROOT = Path(__file__).parents[2]
LLAMA = [
    "model.num_query_groups=2", "model.bias=false", "model.tie_embeddings=false",
    "model.activation=swiglu", "model.normalization=rmsnorm",
]  # fmt: skip
GPT2 = [
    "model.normalization=layernorm", "model.activation=gelu", "model.position=learned", "model.bias=true",
]  # fmt: skip
CASES = {
    "llama": (1, LLAMA),
    "qk norm and biases": (1, [*LLAMA, "model.qk_norm=true", "model.bias=true"]),
    "gpt2": (1, GPT2),
    "gpt2, recompute": (1, [*GPT2, "parallel.recompute=full"]),
    "gpt2, dropout": (1, [*GPT2, "model.hidden_dropout=0.1"]),
    "llama with biases on TP 2": (2, [*LLAMA, "model.bias=true"]),
    "gpt2 on TP 2 + SP": (2, [*GPT2, "parallel.sequence=true"]),
}


# Stages of one layer each, two on each rank, and the same model on one rank.
STAGED = [*LLAMA, "model.num_layers=4", "train.global_batch=4"]
STAGES = {1: STAGED, 2: [*STAGED, "parallel.pipeline=2", "parallel.virtual_pipeline=2"]}

# Of one layer: the linears (0 qkv, 1 proj, 2 fc1, 3 fc2) whose input, and whose output's gradient, come with
# their amaxes. What sequence parallelism gathers is measured anew, and so is a norm's output where a rotation
# over sixteen tokens does not divide them, and its gradient where one is rotated.
HANDED = {
    "gpt2, nvfp4": (1, [*GPT2, "precision=nvfp4"], "023", "02"),
    "gpt2, nvfp4, 30 tokens": (1, [*GPT2, "precision=nvfp4", "model.seq_length=15"], "3", "02"),
    "gpt2, fp8": (1, [*GPT2, "precision=fp8"], "023", "0123"),
    "llama, fp8 on TP 2": (2, [*LLAMA, "precision=fp8"], "023", "123"),
    "gpt2, fp8 on TP 2 + SP": (2, [*GPT2, "precision=fp8", "parallel.sequence=true"], "3", "02"),
}
WHOLE = [
    "precision.keep.first_blocks=0", "precision.keep.last_blocks=0", "model.num_layers=1",
]  # fmt: skip


ADAM = {
    "adam, fp32": [],
    "adam, fp32, distributed": ["parallel.distributed_optimizer=true"],
    "adam, bf16": ["optim.params_dtype=bf16"],
    "adam, bf16, distributed": ["optim.params_dtype=bf16", "parallel.distributed_optimizer=true"],
}


@cache
def told_by(ranks: int) -> dict[str, dict]:
    """What all cases of so many ranks tell: one process a rank, whose start takes as long as a case."""
    cases = {name: overrides for name, (n, overrides) in CASES.items() if n == ranks}
    cases |= {name: [*case[1], *WHOLE] for name, case in HANDED.items() if case[0] == ranks}
    cases |= ADAM if ranks == 1 else {}
    cases["staged"] = STAGES[ranks]
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("fused_model.py"))
    done = subprocess.run(
        [sys.executable, *(launch if ranks > 1 else []), script, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, dict] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("case", CASES)
def test_fused_and_plain_models_have_one_loss_and_one_gradient(case: str) -> None:
    told = told_by(CASES[case][0])[case]
    # sums of at most 300 terms (the vocabulary) of FP32 in another order: 300 * 2^-24
    assert told["worst"][1] < 2e-5, told
    assert told["loss"] < 1e-6
    modules = ["FusedMLP", "FusedNorm", "FusedSelfAttention", "FusedVocabEmbedding"]
    learned = "model.position=learned" in CASES[case][1]
    assert told["modules"] == sorted([*modules, *["FusedPositionEmbedding"] * learned]), told


def test_pipeline_stages_change_no_bit() -> None:
    one, two = (told_by(ranks)["staged"] for ranks in STAGES)
    assert two == one
    # both norms of each of four layers, in two microbatches; nobody else reads what the last norm reads
    assert one["added"] == 2 * 4 * 2


@pytest.mark.parametrize("case", HANDED)
def test_an_amax_that_comes_with_a_tensor_is_the_one_that_is_measured(case: str) -> None:
    ranks, _, inputs, gradients = HANDED[case]
    wanted = {f"{n} {cast}" for n in inputs for cast in ("fprop x", "wgrad x")}
    wanted |= {f"{n} {cast}" for n in gradients for cast in ("dgrad dy", "wgrad dy")}
    assert told_by(ranks)[case] == {"handed": dict.fromkeys(wanted, 1), "wrong": []}


@pytest.mark.parametrize("case", ADAM)
def test_our_adam_is_torch_s_and_goes_on_from_its_checkpoints(case: str) -> None:
    told = told_by(1)[case]
    assert told["adam"] == ["torch's AdamW", "torch's AdamW, by our kernel"]
    # three updates that FP32 rounds otherwise; the interpreter cuts BF16 weights off, by up to 2^-7
    assert told["error"] < (2**-7 if "bf16" in case else 1e-6), told
    assert told["again"]
