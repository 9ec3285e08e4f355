"""What ``bench`` counts and prints, with a clock of its own: no GPU needed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp4_kernels.quantize import _allocate
from rich.console import Console

from fp4pretrain.bench import kernels, linear, step, timing
from fp4pretrain.cli import main
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import Recipe

CPU = torch.device("cpu")
INPUTS = 3


@pytest.mark.parametrize("name", kernels.CASTS)
def test_the_bytes_counted_are_those_a_cast_writes(name: str) -> None:
    row, col, written, _ = kernels.CASTS[name]
    x = torch.zeros(1024, 2048, dtype=torch.bfloat16)
    amax = torch.zeros(())
    made = [_allocate(x, row, (1024, 2048), amax), _allocate(x, col, (2048, 1024), amax)]
    total = sum(
        t.numel() * t.element_size() for q in made if q for t in (q.out, q.scales) if t is not None
    )
    # a factor a row is left out of the count: 4 bytes in 1024
    assert total / x.numel() == pytest.approx(written, abs=0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A GPU on which everything takes ``us`` microseconds (the nth call n times that where it gets
    ``slower``) and the host ``host``."""
    times = {"us": 8.0, "host": 3.0, "calls": 0, "slower": 0}

    def sustained_microseconds(work: Any) -> float:
        work()
        times["calls"] += 1
        return times["us"] * times["calls"] if times["slower"] else times["us"]

    def steady_microseconds(works: Any) -> float:
        assert len(works) == INPUTS
        for work in works:
            work()
        return times["us"]

    def host_microseconds(work: Any) -> float:
        work()
        return times["host"]

    for module in (kernels, linear):
        monkeypatch.setattr(module, "require_gpu", lambda: CPU)
    for module in (kernels, timing):
        monkeypatch.setattr(module, "steady_microseconds", steady_microseconds)
    monkeypatch.setattr(kernels, "inputs_beyond_cache", lambda *_: INPUTS)
    monkeypatch.setattr(linear, "sustained_microseconds", sustained_microseconds)
    monkeypatch.setattr(linear, "host_microseconds", host_microseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "an abacus")
    return times


def printed(table: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()


def test_kernels_are_held_to_the_bytes_a_copy_moves(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def quantize(x: torch.Tensor, *, row: Any, col: Any = None, **others: Any) -> tuple:
        asked.append((row, col, others.get("row_amax"), others.get("col_amax")))
        return _allocate(x, row, (x.shape[0], x.shape[1]), torch.zeros(())), None

    monkeypatch.setattr(kernels, "quantize", quantize)
    monkeypatch.setattr(kernels, "amax", lambda *_, **__: torch.zeros(2))
    monkeypatch.setattr(
        kernels, "line_amax", lambda x, **_: (torch.zeros(x.shape[0]), torch.zeros(x.shape[1]))
    )
    monkeypatch.setattr(kernels, "unpack", lambda *_: None)
    monkeypatch.setattr(kernels, "unpack_e4m3", lambda *_, **__: None)
    found = kernels.bench_kernels(((256, 128),))
    # everything takes as long as the copy, which moves 4 bytes an element
    shares = {t["kernel"]: t["of_copy"] for t in found["timings"]}
    for name, (_, _, written, _) in kernels.CASTS.items():
        assert shares[name] == pytest.approx((2 + written) / 4)
    assert shares["amax"] == pytest.approx(2 / 4)
    assert found["copy_tb_per_s"] == {"256x128": round(4 * 256 * 128 / 8 / 1e6, 3)}
    for row, col, row_amax, col_amax in asked:
        for copy, amax, length in ((row, row_amax, 256), (col, col_amax, 128)):
            wanted = "none" if copy is None else copy.amax
            assert {"none": None, "tensor": (), "row": (length,)}[wanted] == (
                None if amax is None else tuple(amax.shape)
            )
    assert json.loads(json.dumps(found))["device"] == "an abacus"
    text = printed(kernels.table(found))
    assert all(name in text for name in shares)
    assert "256x128" in text
    assert "88%" in text


def test_linears_are_held_to_bf16_of_the_same_run(clock: dict[str, float]) -> None:
    found = linear.bench_linear({"bf16": (ReferenceBackend(), Recipe())}, ((64, 32, 48),))
    plain, same_work, recipe = found["timings"]
    assert (plain["recipe"], plain["backend"], plain["of_bf16"]) == ("bf16", "torch", 1.0)
    assert recipe["backend"] == "reference"
    assert recipe["of_bf16"] == 1.0
    assert recipe["host_microseconds"] == 3.0
    assert recipe["saved"] == 1.0  # x in BF16, as BF16 keeps it
    assert (same_work["recipe"], same_work["of_bf16"]) == ("bf16 + main grad", 1.0)
    assert clock["calls"] == 4  # BF16 before and after
    text = printed(linear.table(json.loads(json.dumps(found))))
    assert "64x32x48" in text


def test_a_clock_that_falls_is_seen_and_halved(clock: dict[str, float]) -> None:
    clock["slower"] = 1
    found = linear.bench_linear({"bf16": (ReferenceBackend(), Recipe())}, ((64, 32, 48),))
    assert found["bf16_after_of_before"] == {"64x32x48": 4.0}
    # 8 us at first, 32 at last: 20 is what the others, at 16 and 24, are measured by
    assert [t["microseconds"] for t in found["timings"]] == [20.0, 16.0, 24.0]
    assert [t["of_bf16"] for t in found["timings"]] == [1.0, 0.8, 1.2]


def test_a_width_s_cost_stands_beside_its_casts(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Time over BF16's, and in brackets the casts' part: BF16 makes none."""
    monkeypatch.setattr(timing, "require_gpu", lambda: CPU)
    monkeypatch.setattr(linear, "TOKENS", 32)
    monkeypatch.setattr(linear, "choose", lambda *_, **__: (ReferenceBackend(), []))
    main(["bench", "linear", "--precision", "fp8", "--width", "32,64", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "linear.json").read_text())
    assert [t["shape"] for t in found["timings"][::3]] == [[32, 32, 128], [32, 64, 256]]
    assert [t["casts"] for t in found["timings"][:3]] == [0.0, 0.0, 8.0]
    lines = printed(linear.width_table(found)).splitlines()
    assert "d 32" in lines[2] and "d 64" in lines[2]
    assert [line.count("1.00 (0.00)") for line in lines if "bf16" in line] == [2, 2]
    assert [line.count("1.00 (1.00)") for line in lines if "fp8" in line] == [2]


def test_a_width_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "linear", "--width", "1024,wide"])
    assert "give hidden sizes, such as 1024,4096" in capsys.readouterr().err


def test_inputs_flow_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20)
    )
    assert timing.inputs_beyond_cache(64 << 20, CPU) == 7  # 448 MiB, eight caches are 400
    assert timing.inputs_beyond_cache(1 << 30, CPU) == 4


def test_a_timed_step_is_a_linear_s_forward_and_backward() -> None:
    g = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(s, generator=g).bfloat16() for s in ((64, 32), (48, 32), (64, 48)))
    main_grad = torch.ones(48, 32)
    step = linear.linear_step(ReferenceBackend(), Recipe(), (x, w, dy, main_grad))
    y, dx = step.run()
    torch.testing.assert_close(y.double(), x.double() @ w.double().t(), rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(dx.double(), dy.double() @ w.double(), rtol=2**-7, atol=1e-2)
    dw = dy.double().t() @ x.double()
    torch.testing.assert_close(main_grad.double(), dw + 1, rtol=1e-4, atol=1e-4)
    assert step.saved.shape == (32, 64)


@pytest.mark.parametrize("what", ["kernels", "linear"])
def test_without_a_gpu_it_says_so_in_one_line(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as leaving:
        main(["bench", what])
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        "fp4pretrain: bench: there is no CUDA device here; run it on a machine with a GPU\n"
    )


def test_keys_and_backends_reach_the_timed_recipes(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = {}
    monkeypatch.setattr(timing, "require_gpu", lambda: CPU)
    monkeypatch.setattr(
        linear,
        "bench_linear",
        lambda recipes: timed.update(recipes) or {"timings": [], "device": ""},
    )
    monkeypatch.setattr(linear, "table", lambda _: "")
    keys = ["precision.wgrad.fast_accum=true", "precision.backend=reference"]
    main(["bench", "linear", "--precision", "fp8,nvfp4", "--out", str(tmp_path), *keys])
    assert {name: recipe.wgrad.fast_accum for name, (_, recipe) in timed.items()} == {
        "fp8": True, "nvfp4": True,
    }  # fmt: skip
    assert {backend.name for backend, _ in timed.values()} == {"reference"}


def test_kernels_take_no_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "precision.backend=native"])
    said = capsys.readouterr().err
    assert said.startswith("fp4pretrain: precision.backend=native: bench kernels follows no recipe")


def test_kernels_are_told_apart_by_their_names() -> None:
    names = {
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "GEMM",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
        "quantize_kernel": "quantization",
        "line_amax_kernel": "quantization",
        "token_gradients_kernel": "loss",
        "norm_backward_kernel": "norm",
        "column_sums_kernel": "norm",
        "activation_row_backward_kernel": "activation",
        "join_kernel": "copies",
        "rope_kernel": "rope",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl": "activation",
        "multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>>": "optimizer",
        "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<BFloat16>>": step.KINDS[
            -1
        ],
    }
    assert {name: step.kind_of(name) for name in names} == names
    found = step.shares([("nvjet_a", 3.0), ("quantize_kernel", 1.0), ("nvjet_b", 4.0)])
    assert found == {"GEMM": 7 / 8, "quantization": 1 / 8}


def test_whole_steps_are_timed_beside_bf16_on_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["data.mock=true", "model.num_layers=2", "precision.keep.first_blocks=0"]
    small = ["model.seq_length=32", "train.micro_batch=2", "train.global_batch=2"]
    out = ["--out", str(tmp_path), "--steps", "2"]
    main(["bench", "step", *out, "--precision", "nvfp4", "--peer", "55,087 (TE)", *keys, *small])
    found = json.loads((tmp_path / "step.json").read_text())
    bf16, nvfp4 = found["rows"]
    assert (bf16["recipe"], nvfp4["recipe"]) == ("bf16", "nvfp4")
    assert nvfp4["of_first"] == nvfp4["tokens_per_second"] / bf16["tokens_per_second"]
    assert nvfp4["step_ms"] == pytest.approx(1000 * 64 / nvfp4["tokens_per_second"], rel=0.5)
    assert nvfp4["lowest"] <= nvfp4["tokens_per_second"] <= nvfp4["highest"]
    # the same weights and the same batches: what differs is the recipe
    assert bf16["losses"][0] != nvfp4["losses"][0]
    assert bf16["losses"][0] == pytest.approx(nvfp4["losses"][0], rel=0.01)
    printed = capsys.readouterr().out
    assert "another run's figure: 55,087 (TE)" in printed
    assert "CUDA graphs need an NVIDIA GPU" in printed
