"""Time on a GPU, and time on its host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fp4pretrain.errors import UserError


def require_gpu() -> torch.device:
    """The current CUDA device.

    Raises:
        UserError: where there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("bench: there is no CUDA device here; run it on a machine with a GPU")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_microseconds(work: Callable[[], object]) -> float:
    """Median over repetitions, with a cold L2 cache as in training."""
    from triton.testing import do_bench

    return do_bench(work, warmup=15, rep=60, return_mode="median") * 1e3


def host_microseconds(work: Callable[[], object], *, calls: int = 20) -> float:
    """What a call costs the host while the GPU lags behind."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    spent = (time.perf_counter() - start) / calls * 1e6
    torch.cuda.synchronize()
    return spent


def copy_rate(elements: int, device: torch.device) -> float:
    """Bytes a microsecond of a device copy of BF16, read and written."""
    a = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    b = torch.empty_like(a)
    return 4 * elements / gpu_microseconds(lambda: b.copy_(a))
