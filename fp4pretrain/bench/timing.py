"""Time on a GPU, and time on its host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

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


def sustained_microseconds(
    work: Callable[[], object], *, warm: float = 0.4, measured: float = 0.6
) -> float:
    """A call's GPU time in a run of nothing else, as in training: median over batches of ten.

    A GEMM draws more power than a GPU may, and its clock follows within tenths of a second: short
    measurements have the clock that the work before them left. ``warm`` and ``measured`` in seconds.
    A batch is a CUDA graph, as training steps are, so the host is left out; work that waits for the host
    cannot be one, and is launched call by call.
    """
    batch = 10
    run, calls = work, batch
    try:
        run, calls = _captured([work], passes=batch).replay, 1
    except RuntimeError:  # torch's for what may not be captured
        torch.cuda.synchronize()
    _batches(run, calls=calls, seconds=warm)
    return statistics.median(_batches(run, calls=calls, seconds=measured)) * calls / batch


def _captured(works: Sequence[Callable[[], object]], *, passes: int) -> torch.cuda.CUDAGraph:
    """All works, ``passes`` times, as a CUDA graph. Raises RuntimeError where that cannot be."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for work in works:
            work()  # compiles, and makes what a stream keeps
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(passes):
                # held until the next pass: outputs of one pass lie apart
                held = [work() for work in works]
    del held
    return graph


def _batches(
    work: Callable[[], object], *, calls: int, least: int = 1, seconds: float = 0.0
) -> list[float]:
    """Microseconds a call of ``least`` batches or more, until the seconds are over.

    The host is a batch ahead, so the GPU never waits for it between two.
    """
    end = time.perf_counter() + seconds
    marks = [_mark()]
    while len(marks) <= least or time.perf_counter() < end:
        for _ in range(calls):
            work()
        marks.append(_mark())
        marks[-2].synchronize()
    marks[-1].synchronize()
    return [a.elapsed_time(b) / calls * 1e3 for a, b in pairwise(marks)]


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def inputs_beyond_cache(size: int, device: torch.device) -> int:
    """How many inputs of ``size`` bytes flow past the L2 cache before the first comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(4, -(-8 * cache // size))


def steady_microseconds(works: Sequence[Callable[[], object]], *, passes: int = 4) -> float:
    """A call's GPU time in a stream of ``works``, the same on other inputs (``inputs_beyond_cache``).

    Nothing is cleared in between: each call runs with the L2 cache in the state that the previous call
    left, which is the steady state of training. (Clearing the cache with zeros would charge a kernel
    that only reads with writing those zeros back.) The stream is a CUDA graph, so the host is left out;
    median of nine replays.
    """
    replays = _batches(_captured(works, passes=passes).replay, calls=1, least=10)[1:]
    return statistics.median(replays) / passes / len(works)


def host_microseconds(work: Callable[[], object], *, calls: int = 20) -> float:
    """What a call costs the host while the GPU lags behind: median over seven batches."""
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def copy_rate(inputs: Sequence[torch.Tensor]) -> float:
    """Bytes a microsecond of a device copy, read and written."""
    copies = [partial(torch.empty_like(x).copy_, x) for x in inputs]
    return 2 * inputs[0].numel() * inputs[0].element_size() / steady_microseconds(copies)
