"""Fused elementwise kernels compiled for this GPU against float64."""

from __future__ import annotations

import pytest
import torch
from fused_laws import FUSED_CASES, check_fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("case", FUSED_CASES)
def test_a_fused_kernel_computes_what_float64_computes(case: str) -> None:
    assert check_fused(case, device="cuda") == []
