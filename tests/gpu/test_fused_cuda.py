"""Fused kernels compiled for this GPU against float64, and runs that they hand amaxes to.

Such a run has the bits of one whose casts measure what the same kernels wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adam_laws import ADAM_CASES, check_adam
from function_laws import FUNCTION_CASES, check_function
from fused_laws import FUSED_CASES, check_fused
from megatron.core.transformer import TransformerConfig
from records import curve
from torch.profiler import ProfilerActivity, profile

from fp4pretrain.config import compose
from fp4pretrain.nn.attention import CoreAttention
from fp4pretrain.ops import handed, triton_backend
from fp4pretrain.train.main import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GPT2 = [
    "model.normalization=layernorm", "model.activation=gelu", "model.position=learned", "model.bias=false",
]  # fmt: skip
BIASES = "model.bias=true"
RUNS = {
    "fp8, gpt2": ["precision=fp8", *GPT2],
    "fp8, gpt2, biases": ["precision=fp8", *GPT2, BIASES],
    "fp8_delayed, gpt2": ["precision=fp8_delayed", *GPT2],
    "fp8, llama": ["precision=fp8"],
    "fp8, llama, biases": ["precision=fp8", BIASES],
    "nvfp4, gpt2": ["precision=nvfp4", *GPT2],
    "nvfp4, gpt2, plain steps": ["precision=nvfp4", "train.graph=never", *GPT2],
    "nvfp4, gpt2, biases": ["precision=nvfp4", *GPT2, BIASES],
    "nvfp4, gpt2, recompute, biases": ["precision=nvfp4", "parallel.recompute=full", *GPT2, BIASES],
    "nvfp4, squared relu": ["precision=nvfp4", "model.activation=squared_relu", "model.bias=false"],
    "nvfp4, llama": ["precision=nvfp4"],
}
RUN = [
    "data.mock=true", "train.steps=6", "train.micro_batch=4", "train.global_batch=8",
    "train.eval_interval=3", "data.valid_tokens=2048", "logging=quiet", "model.seq_length=128",
    "checkpoint.at_end=false", "precision.keep.first_blocks=0", "precision.keep.last_blocks=0",
    "train.deterministic=true",
]  # fmt: skip


def rows(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """What a run logs of steps and evaluations that is no time."""
    train(compose([*RUN, *overrides, f"run_dir={folder}"]))
    return [row for row in curve(folder) if row["event"] in ("train", "eval")]


@pytest.mark.parametrize("case", ADAM_CASES)
def test_our_adam_computes_what_float64_computes(case: str) -> None:
    assert check_adam(case, device="cuda") == []


@pytest.mark.parametrize("case", FUSED_CASES)
def test_a_fused_kernel_computes_what_float64_computes(case: str) -> None:
    assert check_fused(case, device="cuda") == []


@pytest.mark.parametrize("case", FUNCTION_CASES)
def test_a_bias_has_its_gradient_wherever_that_goes(case: str) -> None:
    assert check_function(*case.split()[1:], device="cuda") == []


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_handed_amaxes_has_the_bits_of_one_that_measures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, measured = triton_backend.tensor_amaxes, [0]

    def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        measured[0] += 1
        return measure(*arguments, **keywords)

    monkeypatch.setattr(triton_backend, "tensor_amaxes", counted)
    found, passes = [], []
    for turn in ("handed", "measured"):
        if turn == "measured":
            monkeypatch.setattr(handed, "take", lambda x, casts: {})
        rows(
            tmp_path / f"warm {turn}", [*RUNS[name], "train.steps=1"]
        )  # checks of GEMMs measure too
        measured[0] = 0
        found.append(rows(tmp_path / turn, RUNS[name]))
        passes.append(measured[0])
    assert found[0] == found[1]
    assert passes[0] < passes[1]


# Kernels' names are asked for, which only a run on that GPU shows. On others nothing is promised.
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="another GPU: PyTorch chooses attention's kernels there",
)
def test_attention_on_hopper_is_cudnn_s() -> None:
    torch.use_deterministic_algorithms(
        False
    )  # runs of other tests ask for an order that cuDNN's lacks
    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=2)
    core = CoreAttention(config, 1, None, "self", attention_dropout=0.0)
    q, k, v = (
        torch.randn(256, 2, 2, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for _ in range(3)
    )
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        core(q, k, v).sum().backward()
        torch.cuda.synchronize()  # kernels that end later are not seen
    kernels = [event.name for event in seen.events()]
    assert sum("cudnn" in name and "flash" in name for name in kernels) >= 2, kernels
    assert not [name for name in kernels if "pytorch_flash" in name]
