"""Captured steps compute the bits of plain ones: losses, norms and weights, over switches and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ahead import steps_ahead
from records import curve

from fp4pretrain.config import compose
from fp4pretrain.train.main import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RUN = [
    "data.mock=true", "train.steps=10", "train.micro_batch=4", "train.global_batch=8",
    "train.eval_interval=4", "data.valid_tokens=2048", "logging=quiet", "model.seq_length=128",
    "checkpoint.at_end=false", "train.deterministic=true",
]  # fmt: skip
RECIPES = {
    "bf16": ["precision=bf16"],
    "fp8_delayed": ["precision=fp8_delayed"],
    "nvfp4": ["precision=nvfp4"],
    "mxfp4_h16": ["precision=mxfp4_h16"],
    "signs of each GEMM": ["precision=mxfp4_rht_sr"],
    "a switch at 60%": [
        "precision=nvfp4",
        "precision.tail.at=0.6",
        "precision.tail.to_bf16=[fprop]",
    ],
    "recompute": ["precision=nvfp4", "parallel.recompute=full"],
    "observed": ["precision=nvfp4", "observe.interval=3"],
}


# Steps that were read while the next one had begun, where those are not 2, 3, 5, 6, 7 and 9.
AHEAD = {
    "a switch at 60%": {2, 3, 5, 9},
    "observed": {7},
}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are read while the next one has begun."""
    return steps_ahead(monkeypatch)


def rows(folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """What a run logs of steps and evaluations that is no time."""
    train(compose([*RUN, *overrides, f"run_dir={folder}"]))
    return [row for row in curve(folder) if row["event"] in ("train", "eval")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_captured_run_has_the_bits_of_a_plain_one(
    name: str, tmp_path: Path, ahead: list[int]
) -> None:
    rows(tmp_path / "warm", [*RECIPES[name], "train.graph=never", "train.steps=2"])
    plain = rows(tmp_path / "plain", [*RECIPES[name], "train.graph=never"])
    assert ahead == []
    assert rows(tmp_path / "captured", [*RECIPES[name], "train.graph=always"]) == plain
    # The second step is captured, evaluations come after 4 and 8. A switch has step 7 rehearsed; steps 3,
    # 6 and 9 are watched.
    assert set(ahead) == AHEAD.get(name, {2, 3, 5, 6, 7, 9})


def test_a_captured_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    keys = ["precision=nvfp4", "train.graph=always", "checkpoint.interval=6"]
    rows(tmp_path / "warm", [*keys, "train.steps=2"])
    whole = rows(tmp_path / "whole", keys)
    again = rows(tmp_path / "whole", [*keys, "resume=auto"])  # from step 6: the end is not saved
    assert again == whole
