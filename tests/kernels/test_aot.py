"""Every kernel compiles for every GPU it is meant for, and the native GEMM multiplies in FP4 there."""

from __future__ import annotations

import re

import pytest
from aot import TARGETS, compile_kernel, kernels

CASES = [(name, target) for target in TARGETS for name in kernels(target)]
FP4 = {
    ("native nvfp4", "sm_100"): r"tcgen05\.mma\S*kind::mxf4nvf4",
    ("native mxfp4", "sm_100"): r"tcgen05\.mma\S*kind::mxf4\b",
    ("native nvfp4", "sm_120"): r"mma\.sync\S*kind::mxf4nvf4",
    ("native mxfp4", "sm_120"): r"mma\.sync\S*kind::mxf4",
    ("native mxfp4", "gfx950"): r"v_mfma_scale_f32\w*f8f6f4",
    ("native mxfp8", "sm_100"): r"tcgen05\.mma\S*kind::mxf8f6f4",
    ("native mxfp8", "sm_120"): r"mma\.sync\S*kind::mxf8f6f4",
    ("native mxfp8", "gfx950"): r"v_mfma_scale_f32\w*f8f6f4",
}
FP8 = {
    "sm_90": r"wgmma\S*f32\.e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\S*kind::f8f6f4",
    "sm_120": r"mma\.sync\S*e4m3\.e4m3",
    "gfx950": r"v_mfma_f32\w*f8f6f4",
}


@pytest.mark.parametrize(("name", "target"), CASES, ids=lambda v: v.replace(" ", "-"))
def test_a_kernel_compiles_ahead_of_time(name: str, target: str) -> None:
    assembly = compile_kernel(name, target)
    if name.startswith("native"):
        assert re.search(FP4[name, target], assembly)
    if name.startswith("block gemm"):
        assert re.search(FP8[target], assembly)
    if name == "quantize fp8" and target != "gfx950":
        # Both copies convert by hardware, and no byte is joined through an undefined half register
        assert "cvt.rn.satfinite.e5m2x2.f32" in assembly


def test_every_native_gemm_has_its_instruction_named() -> None:
    assert set(FP4) == {case for case in CASES if case[0].startswith("native")}
