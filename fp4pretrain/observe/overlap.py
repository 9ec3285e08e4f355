"""How much of a step's communication hides behind computation, from a trace of torch's profiler.

A GPU's kernels are intervals on its time line. NCCL's are communication, the others computation; a
moment at which both run is hidden communication, one at which only NCCL's run is exposed: the step
would be shorter without it. An NCCL kernel also waits for its peers, so exposed time holds the ranks'
imbalance (a pipeline's bubbles too).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Interval = tuple[float, float]


def overlap(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of one GPU's kernels, from ``traceEvents`` of a Chrome trace (times in us).

    Returns compute_ms, communication_ms, hidden_ms and exposed_ms (the two parts of the latter), and
    idle_ms: from the first kernel's start to the last one's end, with none running. All are 0 where
    no kernel ran.
    """
    compute: list[Interval] = []
    communication: list[Interval] = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "kernel":
            start = float(event["ts"])
            to = communication if event["name"].startswith("nccl") else compute
            to.append((start, start + float(event["dur"])))
    busy = _union(compute + communication)
    if not busy:
        return dict.fromkeys(
            ("compute_ms", "communication_ms", "hidden_ms", "exposed_ms", "idle_ms"), 0.0
        )
    times = {"compute_ms": _length(_union(compute))}
    times["communication_ms"] = _length(_union(communication))
    times["exposed_ms"] = _length(busy) - times["compute_ms"]
    times["hidden_ms"] = times["communication_ms"] - times["exposed_ms"]
    times["idle_ms"] = busy[-1][1] - busy[0][0] - _length(busy)
    return {name: microseconds / 1000 for name, microseconds in times.items()}


def _union(intervals: list[Interval]) -> list[Interval]:
    """Disjoint intervals in order that cover the same moments."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(disjoint: list[Interval]) -> float:
    return sum(end - start for start, end in disjoint)
