"""Fused elementwise kernels compiled for this GPU against float64, and runs that they hand amaxes to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fused_laws import FUSED_CASES, check_fused
from fused_runs import RUNS, differences

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("case", FUSED_CASES)
def test_a_fused_kernel_computes_what_float64_computes(case: str) -> None:
    assert check_fused(case, device="cuda") == []


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_handed_amaxes_has_the_bits_of_one_that_measures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert differences(name, tmp_path) == []
