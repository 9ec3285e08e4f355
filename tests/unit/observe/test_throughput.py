"""FLOPs, peaks and rates against numbers known from elsewhere."""

from __future__ import annotations

import pytest
import torch

from fp4pretrain.observe import Throughput, flops_per_token, memory_gib, peak_flops
from fp4pretrain.observe.throughput import peak_flops_by_name


def test_flops_reproduce_a_measured_peer() -> None:
    """megatron-core + TE, GPT 1.41B on an H100: 55,087 tokens/s are 500 TFLOP/s, 50.5% MFU."""
    layers, hidden, vocab, seq = 24, 2048, 50304, 2048
    block = 4 * hidden**2 + 2 * hidden * (4 * hidden) + 2 * hidden
    parameters = layers * block + 2 * vocab * hidden + hidden
    assert parameters == pytest.approx(1.41e9, rel=0.01)
    flops = flops_per_token(
        parameters=parameters,
        input_embedding=vocab * hidden,
        layers=layers,
        attention_width=hidden,
        seq_length=seq,
    )
    assert 55_087 * flops == pytest.approx(500e12, rel=0.001)
    assert 55_087 * flops / 989e12 == pytest.approx(0.505, abs=0.001)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI355X", 2500e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_flops_by_name(name) == peak


def test_a_cpu_has_no_peak_and_so_no_mfu() -> None:
    assert peak_flops(torch.device("cpu")) is None
    meter = Throughput(flops=1.0, peak=None, devices=1, clock=iter([0.0, 2.0]).__next__)
    assert meter.report(10) == {"tokens_per_second": 5.0, "mfu": None}


def test_rates_leave_out_pauses_and_start_anew_at_each_report() -> None:
    # made at 0; paused from 1 to 4; report at 5 (2 s of training); report at 6 (1 s)
    clock = iter([0.0, 1.0, 4.0, 5.0, 6.0]).__next__
    meter = Throughput(flops=10.0, peak=100.0, devices=2, clock=clock)
    with meter.paused():
        pass
    assert meter.report(8) == {"tokens_per_second": 4.0, "mfu": 0.2}
    assert meter.report(8) == {"tokens_per_second": 8.0, "mfu": 0.4}


def test_memory_on_a_cpu_is_the_resident_set() -> None:
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # 0.25 GiB
    assert memory_gib(torch.device("cpu")) - before == pytest.approx(0.25, abs=0.05)
    del held
