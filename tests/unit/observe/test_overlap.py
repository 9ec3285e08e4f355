"""Communication is hidden where a computing kernel runs beside it, and exposed where none does."""

from __future__ import annotations

from typing import Any

import pytest

from fp4pretrain.observe import overlap


def kernel(name: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, **more}


GEMM, NCCL = "sm90_gemm", "ncclDevKernel_ReduceScatter"
CASES = {
    "one after the other": ([(GEMM, 0, 4000), (NCCL, 4000, 6000)], (4, 2, 0, 2, 0)),
    "beside it": ([(GEMM, 0, 4000), (NCCL, 1000, 3000)], (4, 2, 2, 0, 0)),
    "half of it": ([(GEMM, 0, 4000), (NCCL, 3000, 5000)], (4, 2, 1, 1, 0)),
    "across two kernels and the gap between": (
        [(GEMM, 0, 1000), (GEMM, 2000, 4000), (NCCL, 500, 2500)],
        (3, 2, 1, 1, 0),
    ),
    "two collectives at once": ([(NCCL, 0, 3000), (NCCL, 1000, 4000)], (0, 4, 0, 4, 0)),
    "a pause": ([(GEMM, 0, 1000), (GEMM, 6000, 7000)], (2, 0, 0, 0, 5)),
    "nothing": ([], (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_time_line_is_divided(name: str) -> None:
    intervals, want = CASES[name]
    other = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        {"ph": "i", "cat": "kernel", "name": GEMM, "ts": 0},
    ]
    found = overlap([*other, *(kernel(*interval) for interval in reversed(intervals))])
    keys = ("compute_ms", "communication_ms", "hidden_ms", "exposed_ms", "idle_ms")
    assert tuple(found[key] for key in keys) == want
