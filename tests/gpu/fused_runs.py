"""A small run whose casts are handed amaxes, and the same run whose casts measure: what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fp4pretrain.config import compose
from fp4pretrain.nn.linear import QuantLinear
from fp4pretrain.ops import triton_backend
from fp4pretrain.train.main import train

GPT2 = [
    "model.normalization=layernorm", "model.activation=gelu", "model.position=learned", "model.bias=false",
]  # fmt: skip
RUNS = {
    "fp8, gpt2": ["precision=fp8", *GPT2],
    "fp8_delayed, gpt2": ["precision=fp8_delayed", *GPT2],
    "fp8, llama": ["precision=fp8"],
    "nvfp4, gpt2": ["precision=nvfp4", *GPT2],
    "nvfp4, gpt2, plain steps": ["precision=nvfp4", "train.graph=never", *GPT2],
    "nvfp4, gpt2, recompute": ["precision=nvfp4", "parallel.recompute=full", *GPT2],
    "nvfp4, squared relu": ["precision=nvfp4", "model.activation=squared_relu", "model.bias=false"],
    "nvfp4, llama": ["precision=nvfp4"],
}
RUN = [
    "data.mock=true", "train.steps=6", "train.micro_batch=4", "train.global_batch=8",
    "train.eval_interval=3", "data.valid_tokens=2048", "logging=quiet", "model.seq_length=128",
    "checkpoint.at_end=false", "precision.keep.first_blocks=0", "precision.keep.last_blocks=0",
]  # fmt: skip


def rows(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """What a run logs of steps and evaluations that is no time."""
    train(compose([*RUN, *overrides, f"run_dir={folder}"]))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("event", "step", "loss", "grad_norm", "val_loss", "lr")
    return [
        {key: row[key] for key in kept if key in row}
        for row in map(json.loads, lines)
        if row["event"] in ("train", "eval")
    ]


def differences(name: str, folder: Path) -> list[str]:
    """What is wrong with one of RUNS: nothing where both log the same bits and the first measures less."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    measure, awaits = triton_backend.tensor_amaxes, QuantLinear.awaits
    measured = [0, 0]
    found = []
    try:
        for turn in (0, 1):

            def counted(*arguments: Any, turn: int = turn, **keywords: Any) -> torch.Tensor:
                measured[turn] += 1
                return measure(*arguments, **keywords)

            triton_backend.tensor_amaxes = counted
            if turn:
                QuantLinear.awaits = lambda self, tensor: None  # type: ignore[method-assign]
            rows(folder / f"warm {turn}", [*RUNS[name], "train.steps=1"])
            measured[turn] = 0
            found.append(rows(folder / str(turn), RUNS[name]))
    finally:
        triton_backend.tensor_amaxes, QuantLinear.awaits = measure, awaits  # type: ignore[method-assign]
        torch.use_deterministic_algorithms(False)
    bad = [f"{a} is not {b}" for a, b in zip(*found, strict=True) if a != b]
    return bad + ([] if measured[0] < measured[1] else [f"passes of amax: {measured}"])
