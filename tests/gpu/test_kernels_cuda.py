"""Kernels compiled for this GPU against the truth, bit for bit. Shapes hang over the tiles."""

from __future__ import annotations

import pytest
import torch
from inputs import INPUTS
from interpreted import (
    AMAX_CASES,
    COPIES,
    E4M3_CASES,
    LINE_CASES,
    check_amaxes,
    check_copy,
    check_e4m3,
    check_line_amax,
    line_case,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", list(COPIES))
def test_a_copy_equals_the_reference(name: str) -> None:
    assert check_copy(COPIES[name], "plain", device="cuda", times=3) == []


@pytest.mark.parametrize("kind", INPUTS[1:])
@pytest.mark.parametrize("name", ["nvfp4 default", "nvfp4 2d", "mxfp4 rceil", "mxfp8 rceil"])
def test_unusual_inputs_equal_the_reference(name: str, kind: str) -> None:
    assert check_copy(COPIES[name], kind, device="cuda") == []


@pytest.mark.parametrize("case", E4M3_CASES)
def test_mxfp4_in_e4m3_is_exact_or_counted(case: str) -> None:
    assert check_e4m3(*case.split()[1:], device="cuda") == []


@pytest.mark.parametrize("case", LINE_CASES)
def test_amaxes_of_rotated_rows_and_columns(case: str) -> None:
    assert check_line_amax(*line_case(case), device="cuda") == []


@pytest.mark.parametrize("case", AMAX_CASES)
def test_amaxes_after_every_pair_of_rotations(case: str) -> None:
    assert check_amaxes(*case.split()[1:], device="cuda") == []
