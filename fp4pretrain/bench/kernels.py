"""Kernels beside a device copy: the bytes they move, over the bytes a copy moves in that time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from fp4_kernels.amax import amax, line_amax
from fp4_kernels.quantize import quantize
from fp4_kernels.spec import Copy, Noise, Turn
from fp4_kernels.unpack import unpack, unpack_e4m3

from fp4pretrain.bench.timing import (
    copy_rate,
    inputs_beyond_cache,
    require_gpu,
    steady_microseconds,
)
from fp4pretrain.numerics import signs_te

SHAPES = ((8192, 4096), (8192, 14336), (16384, 8192))
_NV = Copy("nvfp4", output="exact")
_SR = replace(_NV, rounding="stochastic", noise=Noise(0x9E3779B97F4A7C15))
_H16 = replace(_NV, rotation=16, signs=signs_te())
_H16_SR = replace(_SR, rotation=16, signs=signs_te())
_MX = Copy("mxfp4", scale="even", output="e4m3")
_FP8 = Copy("fp8_e4m3", "tensor")
_FP8_1D = Copy("fp8_e4m3", "1d")

# name: (row copy, column copy, bytes written an element, share of copy speed aimed at)
CASTS: dict[str, tuple[Copy | None, Copy | None, float, float | None]] = {
    "nvfp4 one copy": (_NV, None, 2.0, 0.85),
    "nvfp4 one copy, packed": (replace(_NV, output="codes"), None, 0.5625, None),
    "nvfp4 one copy, SR": (_SR, None, 2.0, None),
    "nvfp4 row + column H16": (_NV, _H16, 4.0, 0.88),
    "nvfp4 row + column H16, packed": (_NV, replace(_H16, output="codes"), 2.5625, None),
    "nvfp4 row + column H16, both SR": (_SR, _H16_SR, 4.0, 0.80),
    "nvfp4 2d": (replace(_NV, block="2d"), None, 2.0, None),
    "mxfp4 as e4m3, row + column H16": (_MX, replace(_MX, rotation=16), 2.0, None),
    "mxfp4 as e4m3, both H16": (replace(_MX, rotation=16), replace(_MX, rotation=16), 2.0, None),
    "fp8 row + column": (_FP8, _FP8, 2.0, None),
    "fp8 in 128-blocks, row + column": (_FP8_1D, _FP8_1D, 2.0625, None),
}


@dataclass(frozen=True)
class Timing:
    """One kernel at one shape. ``of_copy``: its bytes a second over a device copy's."""

    kernel: str
    shape: tuple[int, int]
    microseconds: float
    of_copy: float
    target: float | None


def bench_kernels(shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, Any]:
    """{device, copy_tb_per_s by shape, timings}, on the current GPU.

    Raises:
        UserError: without a GPU.
    """
    device = require_gpu()
    timings: list[Timing] = []
    rates = {}
    for shape in shapes:
        elements = shape[0] * shape[1]
        inputs = [
            torch.randn(shape, device=device).bfloat16()
            for _ in range(inputs_beyond_cache(2 * elements, device))
        ]
        rate = copy_rate(inputs)
        rates["x".join(map(str, shape))] = round(rate / 1e6, 3)
        jobs = [_jobs(x) for x in inputs]
        for name, (_, traffic, target) in jobs[0].items():
            us = steady_microseconds([job[name][0] for job in jobs])
            timings.append(Timing(name, shape, us, traffic * elements / us / rate, target))
    return {
        "device": torch.cuda.get_device_name(device),
        "copy_tb_per_s": rates,
        "timings": [asdict(t) for t in timings],
    }


Job = tuple[Callable[[], object], float, float | None]


def _jobs(x: torch.Tensor) -> dict[str, Job]:
    """The timed kernels: name -> (work, bytes moved an element, target as a share of a copy's speed)."""
    turn = Turn(16, signs_te())
    scalars, lines = amax(x, col=turn), line_amax(x, col=turn)
    lost = torch.zeros(2, dtype=torch.int64, device=x.device)

    def cast(row: Copy | None, col: Copy | None) -> Callable[[], object]:
        def amax_of(copy: Copy | None, side: int) -> torch.Tensor | None:
            kind = "none" if copy is None else copy.amax
            return {"none": None, "tensor": scalars[side], "row": lines[side]}[kind]

        row_amax, col_amax = amax_of(row, 0), amax_of(col, 1)
        return lambda: quantize(
            x, row=row, col=col, row_amax=row_amax, col_amax=col_amax, lost=lost
        )

    jobs: dict[str, Job] = {
        name: (cast(row, col), 2 + written, target)
        for name, (row, col, written, target) in CASTS.items()
    }
    packed: Any = quantize(x, row=replace(_NV, output="codes"), row_amax=scalars[0])[0]
    jobs["amax"] = (lambda: amax(x), 2.0, 0.85)
    jobs["amax of x and of its rotated transpose"] = (lambda: amax(x, col=turn), 2.0, 0.85)
    jobs["amax of every row and column"] = (lambda: line_amax(x, col=turn), 2.0, None)
    jobs["amax of every row and column, both H16"] = (
        lambda: line_amax(x, row=Turn(16), col=Turn(16)),
        2.0,
        None,
    )
    jobs["unpack"] = (lambda: unpack(packed.out, packed.scales), 2.5625, None)
    mx: Any = quantize(x, row=replace(_MX, output="codes"))[0]
    jobs["unpack mxfp4 to e4m3"] = (
        lambda: unpack_e4m3(mx.out, mx.scales, lost=lost[0]),
        1.53125,
        None,
    )
    return jobs


def table(found: dict[str, Any]) -> Any:
    """The timings as a rich table."""
    from rich.table import Table

    shown = Table(title=f"{found['device']}, copy {found['copy_tb_per_s']} TB/s")
    for column in ("kernel", "shape", "us", "of copy", "target"):
        shown.add_column(column, justify="left" if column == "kernel" else "right")
    for t in found["timings"]:
        target = "" if t["target"] is None else f"{t['target']:.0%}"
        shape = "x".join(map(str, t["shape"]))
        shown.add_row(t["kernel"], shape, f"{t['microseconds']:.1f}", f"{t['of_copy']:.1%}", target)
    return shown
