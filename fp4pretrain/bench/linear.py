"""One linear, forward and backward, by recipe, beside PyTorch's BF16 in the same run.

Timed as in training: the weight's casts are made once a step and left out, x is cast in the forward
pass, dy in the backward pass, dw is added to an FP32 main gradient. PyTorch's three products do not add
it: ``bf16 + main grad`` is BF16 with the same work. The casts of x and dy are timed once more on their own:
GEMMs grow with the width, casts a token and feature do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from fp4pretrain.bench.timing import host_microseconds, require_gpu, sustained_microseconds
from fp4pretrain.ops import Backend, Cast, Moment, Operand, Shard, choose, linear_casts
from fp4pretrain.precision import BF16, Plan, Recipe

SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192))  # tokens, k, n
TOKENS, WIDER = 8192, 4  # of ``of_widths``: tokens, and n over k as in the first linear of an MLP


def of_widths(widths: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """The shape of an MLP's first linear at each hidden size."""
    return tuple((TOKENS, width, WIDER * width) for width in widths)


@dataclass(frozen=True)
class LinearTiming:
    """``of_bf16``: GPU time over BF16's; ``casts``: the casts of x and dy alone, microseconds; ``saved``:
    bytes saved for the backward pass over BF16's."""

    recipe: str
    backend: str
    shape: tuple[int, int, int]
    microseconds: float
    casts: float
    of_bf16: float
    host_microseconds: float
    saved: float | None


def casts_of(recipe: Recipe, *, step: int = 0) -> dict[str, Cast]:
    """The six casts of an unsharded linear, by "gemm.operand"."""
    return linear_casts(recipe.interned(), Moment(1, step, 0), Shard("column")).all()


class LinearStep(NamedTuple):
    """``run``: one forward and backward, (y, dx); ``cast``: its casts of x and dy alone; ``saved``: x for the
    backward pass."""

    run: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    cast: Callable[[], object]
    saved: Operand


def linear_step(backend: Backend, recipe: Recipe, tensors: tuple[torch.Tensor, ...]) -> LinearStep:
    """Of x [t, k], w [n, k], dy [t, n] and main [n, k], to which dw is added."""
    x, w, dy, main = tensors
    casts = casts_of(recipe)
    w_fprop, w_dgrad = backend.quantize(w, [casts["fprop.w"], casts["dgrad.w"]])
    x_casts = [casts["fprop.x"], casts["wgrad.x"]]
    dy_casts = [casts["dgrad.dy"], casts["wgrad.dy"]]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        x_row, x_col = backend.quantize(x, x_casts)
        fast = recipe.fprop.fast_accum, recipe.dgrad.fast_accum, recipe.wgrad.fast_accum
        y = backend.gemm(x_row, w_fprop, out_dtype=x.dtype, fast_accum=fast[0])
        dy_row, dy_col = backend.quantize(dy, dy_casts)
        dx = backend.gemm(dy_row, w_dgrad, out_dtype=x.dtype, fast_accum=fast[1])
        backend.gemm(
            dy_col, x_col, out_dtype=torch.float32, accumulate_into=main, fast_accum=fast[2]
        )
        return y, dx

    def cast() -> object:
        return backend.quantize(x, x_casts), backend.quantize(dy, dy_casts)

    return LinearStep(step, cast, backend.quantize(x, x_casts)[1])


def bench_linear(
    recipes: Mapping[str, tuple[Backend, Recipe]],
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
) -> dict[str, Any]:
    """{device, bf16_after_of_before, timings}: every recipe on its backend, on the current GPU.

    BF16 is timed before the others and after them, and stands for the mean: their quotient is what
    the GPU's clock did meanwhile.

    Raises:
        UserError: without a GPU.
    """
    device = require_gpu()
    same_work, _ = choose("auto", Plan(BF16, num_layers=1), device)
    timings: list[LinearTiming] = []
    drifts = {}
    for t, k, n in shapes:
        x, dy = (torch.randn(t, c, device=device).bfloat16() for c in (k, n))
        w = torch.randn(n, k, device=device).bfloat16()
        main = torch.zeros(n, k, device=device)
        plain = _plain(x, w, dy)
        before, host = sustained_microseconds(plain), host_microseconds(plain)
        found = [LinearTiming("bf16", "torch", (t, k, n), before, 0.0, 1.0, host, 1.0)]
        for name, (backend, recipe) in {"bf16 + main grad": (same_work, BF16), **recipes}.items():
            step = linear_step(backend, recipe, (x, w, dy, main))
            us, host = sustained_microseconds(step.run), host_microseconds(step.run)
            casts = sustained_microseconds(step.cast) if recipe.quantized else 0.0
            share = step.saved.nbytes / (x.numel() * x.element_size())
            found.append(LinearTiming(name, backend.name, (t, k, n), us, casts, 0.0, host, share))
        after = sustained_microseconds(plain)
        drifts["x".join(map(str, (t, k, n)))] = round(after / before, 3)
        base = (before + after) / 2
        found[0] = replace(found[0], microseconds=base)
        timings += [replace(one, of_bf16=one.microseconds / base) for one in found]
    return {
        "device": torch.cuda.get_device_name(device),
        "bf16_after_of_before": drifts,
        "timings": [asdict(one) for one in timings],
    }


def _plain(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    def step() -> tuple[torch.Tensor, ...]:
        return torch.mm(x, w.t()), torch.mm(dy, w), torch.mm(dy.t(), x)

    return step


def table(found: dict[str, Any]) -> Any:
    """The timings as a rich table."""
    from rich.table import Table

    shown = Table(title=f"{found['device']}: one linear, forward + backward")
    columns = (
        "recipe",
        "backend",
        "tokens x k x n",
        "us",
        "casts us",
        "of bf16",
        "host us",
        "saved",
    )
    for column in columns:
        text = column in ("recipe", "backend")
        shown.add_column(column, justify="left" if text else "right")
    for t in found["timings"]:
        shown.add_row(
            t["recipe"], t["backend"], "x".join(map(str, t["shape"])), f"{t['microseconds']:.0f}",
            f"{t['casts']:.0f}", f"{t['of_bf16']:.2f}", f"{t['host_microseconds']:.0f}", f"{t['saved']:.2f}",
        )  # fmt: skip
    return shown


def width_table(found: dict[str, Any]) -> Any:
    """Time over BF16's by recipe and width as a rich table; in brackets the casts' part of BF16's time."""
    from rich.table import Table

    timings = found["timings"]
    bf16 = {t["shape"][1]: t["microseconds"] for t in timings if t["recipe"] == "bf16"}
    shown = Table(
        title=f"{found['device']}: one linear d x {WIDER}d, {TOKENS} tokens, of BF16 (casts)"
    )
    shown.add_column("recipe")
    shown.add_column("backend")
    for width in bf16:
        shown.add_column(f"d {width}", justify="right")
    for name, backend in {t["recipe"]: t["backend"] for t in timings}.items():
        own = {t["shape"][1]: t for t in timings if t["recipe"] == name}
        shown.add_row(
            name,
            backend,
            *(f"{own[w]['of_bf16']:.2f} ({own[w]['casts'] / bf16[w]:.2f})" for w in bf16),
        )
    return shown
