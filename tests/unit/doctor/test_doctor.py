"""The doctor's table: every backend and GEMM has an instruction or a reason, for every shipped recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from covering import COVERING
from fp4_kernels import cublaslt

from fp4pretrain.cli import main
from fp4pretrain.config import compose, plan_of
from fp4pretrain.doctor import examine
from fp4pretrain.ops import triton_backend
from fp4pretrain.ops.choice import available
from fp4pretrain.ops.cpp_backend import why_missing
from fp4pretrain.precision import GEMMS, Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def recipe_of(name: str) -> Recipe:
    return plan_of(compose([f"precision={name}"])).recipe


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, tuple[int, int]], None]]:
    """Pretend to be on an NVIDIA GPU of a name and capability, with cuBLASLt."""
    remembered = (triton_backend._has_fp8, triton_backend._has_fp8_rows)

    def pretend(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(cublaslt, "why_missing", lambda: None)
        monkeypatch.setattr(triton_backend, "blocks_by_cublaslt", lambda _: False)
        for function in remembered:
            function.cache_clear()

    yield pretend
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize("name", COVERING)
def test_every_backend_and_gemm_has_its_row(name: str) -> None:
    rows, cpp = examine(recipe_of(name), CPU), why_missing() is None
    assert [(backend, gemm) for backend, gemm, *_ in rows] == [
        (backend, gemm) for backend in available() for gemm in GEMMS
    ]
    for backend, _, runs, text in rows:
        assert text
        assert "\n" not in text
        assert runs == (backend == "reference" or (backend == "cpp" and cpp))


@pytest.mark.parametrize("name", ["nvfp4"])  # it composes every recipe
def test_the_command_prints_them(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")
    main(["doctor", f"precision={name}"])
    printed = capsys.readouterr().out
    assert f"precision={name} on CPU" in printed
    for backend in available():
        assert printed.count(f"{backend} ") >= len(GEMMS)


# Formats, roundings and scale rules that the kernels do not have: the reference runs them on a GPU.
WITHOUT_KERNEL = {
    "int4", "mxfp6", "quartet2", "tetrajet2", "ue5m3", "ue5m3_b32", "nvfp4_local_h16",
    "mxfp4_h32_full_grid",
}  # fmt: skip
HOPPER = {
    "bf16": "wgmma bf16 (cuBLASLt)",
    "nvfp4": "wgmma bf16 (cuBLASLt)",
    "mxfp8": "wgmma bf16 (cuBLASLt)",
    "mxfp4_h16": "wgmma e4m3/e5m2 (cuBLASLt)",
    "mxfp4_rht_sr": "wgmma e4m3/e5m2 (cuBLASLt)",
    "fp8": "wgmma e4m3/e5m2 (cuBLASLt)",
    "fp8_delayed": "wgmma e4m3/e5m2 (cuBLASLt)",
    "mxfp4_bwd": "wgmma e4m3/e5m2 (cuBLASLt)",
    "mxfp4_random_h16": "wgmma e4m3/e5m2 (cuBLASLt)",
    **dict.fromkeys(("averis", "hot_channels", "nvfp4_fixed"), "wgmma bf16 (cuBLASLt)"),
    "fp8_block": "wgmma e4m3/e5m2, scaled in blocks of 128 (Triton)",
}


def test_a_format_without_a_kernel_is_refused_in_a_clause(gpu: Callable) -> None:
    gpu("NVIDIA H100", (9, 0))
    rows = [row for row in examine(recipe_of("int4"), CUDA) if row[0] == "triton"]
    assert rows
    assert all(not runs and "its kernels have no format int4" in text for *_, runs, text in rows)


@pytest.mark.parametrize("name", HOPPER)
def test_on_hopper_triton_runs_every_shipped_recipe(name: str, gpu: Callable) -> None:
    gpu("NVIDIA H100", (9, 0))
    recipe = recipe_of(name)
    rows = {gemm: row for backend, gemm, *row in examine(recipe, CUDA) if backend == "triton"}
    assert all(runs for runs, _ in rows.values()), rows
    # a GEMM whose operands a recipe leaves in BF16 says so
    found = {g: rows[g][1] for g in GEMMS if any(s.quantized for s in vars_of(recipe, g))}
    assert found or name == "bf16"
    fast = {g for g, text in found.items() if "fast accumulation" in text}
    assert fast == {g for g in GEMMS if recipe.gemm(g).fast_accum}
    assert {text.replace(", fast accumulation", "") for text in found.values()} <= {HOPPER[name]}


def vars_of(recipe: Recipe, gemm: str) -> list:
    return [spec for g, _, spec in recipe.operands() if g == gemm]


def test_a_recipe_of_this_test_is_every_shipped_one() -> None:
    assert set(HOPPER) | WITHOUT_KERNEL == set(COVERING)


def test_exact_mxfp4_is_shown(gpu: Callable) -> None:
    gpu("NVIDIA H100", (9, 0))
    rows = examine(recipe_of("mxfp4_h16"), CUDA, mxfp4_emulation="bf16")
    assert {text for backend, *_, text in rows if backend == "triton"} == {"wgmma bf16 (cuBLASLt)"}


@pytest.mark.parametrize("name", ["fp8", "fp8_block"])
def test_without_fp8_tensor_cores_fp8_is_refused_and_mxfp4_is_exact(
    name: str, gpu: Callable
) -> None:
    gpu("NVIDIA A100", (8, 0))
    rows = [row for row in examine(recipe_of(name), CUDA) if row[0] == "triton"]
    assert [(runs, text) for *_, runs, text in rows] == [
        (False, "it needs FP8 tensor cores (Ada or later)")
    ] * 3
    rows = [row for row in examine(recipe_of("mxfp4_h16"), CUDA) if row[0] == "triton"]
    assert [(runs, text) for *_, runs, text in rows] == [(True, "mma.sync bf16 (cuBLASLt)")] * 3


MIXED = {
    "FP8 in blocks of 128 needs both operands so": [
        "precision=fp8_block", "precision.fprop.w.block=tensor"
    ],
    "mxfp4 and mxfp8 do not meet in one tensor-core format": [
        "precision=mxfp4_h16", "precision.fprop.w.format=mxfp8"
    ],
    "fp8_e4m3 and bf16 do not meet in one tensor-core format": [
        "precision=fp8", "precision.fprop.w.format=bf16", "precision.fprop.w.block=default"
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", MIXED)
def test_pairs_that_no_tensor_core_multiplies_are_refused_with_the_reason(
    reason: str, gpu: Callable
) -> None:
    gpu("NVIDIA H100", (9, 0))
    rows = examine(plan_of(compose(MIXED[reason])).recipe, CUDA)
    assert ("triton", "fprop", False, reason) in rows
    assert [runs for backend, _, runs, _ in rows if backend == "reference"] == [True] * 3
