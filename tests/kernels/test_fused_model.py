"""A model of fused kernels computes the loss and the gradients of the model without them, sharded too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    "qk norm": (1, [*LLAMA, "model.qk_norm=true"]),
    "gpt2": (1, GPT2),
    "llama on TP 2": (2, LLAMA),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_and_plain_models_have_one_loss_and_one_gradient(case: str) -> None:
    ranks, overrides = CASES[case]
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("fused_model.py"))
    done = subprocess.run(
        [sys.executable, *(launch if ranks > 1 else []), script, *overrides],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    # sums of FP32 in another order; norms over eight small channels enlarge what that does
    assert told["worst"][1] < 1e-4, told
    assert told["loss"] < 1e-6
    assert told["modules"] == ["FusedMLP", "FusedNorm", "FusedSelfAttention"], told
