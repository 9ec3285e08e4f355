"""A recipe's casts on this machine's CPU, by C++ beside PyTorch in the same run. No GPU.

The six operands of one linear are made as in a training step, from BF16 activations and gradients and from an
FP32 weight. The two backends take turns, and the least of their times counts: a machine that others use is
slower at times and never faster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fp4pretrain.bench.linear import casts_of
from fp4pretrain.errors import UserError
from fp4pretrain.ops import Backend, Cast
from fp4pretrain.ops.cpp_backend import CppBackend, why_missing
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import OPERANDS, Recipe

SHAPE = (1024, 256, 640)  # tokens, k, n
TURNS = 9


@dataclass(frozen=True)
class CastTiming:
    """Nanoseconds an element of one operand, by backend; ``ratio``: the reference's over C++'s."""

    recipe: str
    operand: str
    reference: float
    cpp: float
    ratio: float


def bench_casts(
    recipes: Mapping[str, Recipe],
    shape: tuple[int, int, int] = SHAPE,
    *,
    backends: Sequence[Backend] | None = None,
) -> dict[str, Any]:
    """{device, threads, shape, timings}: every cast of every recipe, of x [t, k], w [n, k], dy [t, n].

    ``backends``: who stand for the reference and for C++.

    Raises:
        UserError: where there are no C++ casts.
    """
    if backends is None:
        reason = why_missing()
        if reason:
            raise UserError(f"bench casts: there are no C++ casts here ({reason})")
        backends = (ReferenceBackend(), CppBackend())
    t, k, n = shape
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(t, c, generator=g).bfloat16() for c in (k, n))
    tensors = {"x": x, "w": torch.randn(n, k, generator=g), "dy": dy}
    found = []
    for name, recipe in recipes.items():
        casts = casts_of(recipe)
        for gemm, operands in OPERANDS.items():
            for operand in operands:
                cast, tensor = casts[f"{gemm}.{operand}"], tensors[operand]
                if cast.spec.quantized:
                    slow, fast = _least(backends, tensor, cast)
                    found.append(CastTiming(name, f"{gemm} {operand}", slow, fast, slow / fast))
    return {
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "shape": list(shape),
        "timings": [asdict(one) for one in found],
    }


def _least(backends: Sequence[Backend], x: Tensor, cast: Cast) -> list[float]:
    """Nanoseconds an element by backend: the least of some turns."""
    least = [float("inf")] * len(backends)
    for _ in range(TURNS + 1):
        for i, backend in enumerate(backends):
            begun = time.perf_counter_ns()
            backend.quantize(x, [cast])
            least[i] = min(least[i], time.perf_counter_ns() - begun)
    return [ns / x.numel() for ns in least]


def table(found: dict[str, Any]) -> Any:
    """The timings as a rich table."""
    from rich.table import Table

    shape = "x".join(map(str, found["shape"]))
    shown = Table(title=f"casts on a CPU, {found['threads']} threads, tokens x k x n {shape}")
    for column in ("recipe", "operand", "reference ns an element", "cpp", "ratio"):
        text = column in ("recipe", "operand")
        shown.add_column(column, justify="left" if text else "right")
    for one in found["timings"]:
        numbers = (one["reference"], one["cpp"], one["ratio"])
        shown.add_row(one["recipe"], one["operand"], *(f"{v:.2f}" for v in numbers))
    return shown
