"""Whole training steps by recipe, one after the other in one process on the same data.

    tokens a second     median over the steps after the first ones, in which kernels are compiled and tuned
    MFU                 FLOPs of a token (`fp4pretrain.observe.throughput`) times tokens a second, over the
                        dense BF16 peak of the GPU, whatever the recipe; ``mfu_fp8`` over the FP8 peak, twice
                        that
    busy                milliseconds of the profiled steps in which any kernel ran, over the unprofiled time
    shares              of the kernels' time, by what their names say

Recipes are compared within one call: a GPU's clock, its neighbours and its driver differ between calls.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.model.engine import check_engine
from fp4pretrain.model.layout import check_layout
from fp4pretrain.observe import memory_gib, overlap, peak_flops
from fp4pretrain.parallel.groups import leave, pick_device, world_size
from fp4pretrain.train.hooks.logging import flops_of
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import Trainer, build_trainer, join_run

WARM = 6  # steps before the first that is timed: rehearsed, captured, buffers allocated
PROFILED = 2

# The first pattern that is found in a kernel's name says what it does. Column sums end the gradients of
# norms' weights, and of biases.
_KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl"),
    ("quantization", r"quantize_kernel|amax_kernel|unpack"),
    ("loss", r"cross_entropy|log_softmax|nll_loss|token_statistics|token_gradients|token_rescale"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("GEMM", r"gemm|cutlass|xmma|nvjet|cublas|splitK|matmul"),
    (
        "norm",
        r"norm_kernel|norm_backward|column_sums|layer_norm|rms_norm|LayerNorm|RMSNorm|GammaBeta",
    ),
    ("activation", r"[Gg]elu|[Ss]ilu|relu|activation"),
    ("optimizer", r"[Aa]dam|multi_tensor|lpnorm|LpNorm"),
    ("rope", r"rope|rotary"),
    ("copies", r"Memcpy|Memset|copy|fill|Fill|CatArray|join_kernel"),
)
KINDS = (*(name for name, _ in _KINDS), "elementwise and other")


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name: one of ``KINDS``."""
    return next((name for name, pattern in _KINDS if re.search(pattern, kernel)), KINDS[-1])


def bench_step(
    configs: Mapping[str, RunConfig], *, steps: int, peer: str | None = None
) -> dict[str, Any]:
    """{device, ranks, peer, rows}: a row for each config, in order.

    ``steps``: timed ones. ``peer``: a figure of another run, told as such. Collective under torchrun.
    """
    for config in configs.values():
        check_engine(config, plan_of(config), pick_device(config.parallel.device))
    rows = []
    for name, config in configs.items():
        rows.append({"recipe": name, **_measured(config, steps)})
        first = rows[0]["tokens_per_second"]
        rows[-1]["of_first"] = rows[-1]["tokens_per_second"] / first
    device = pick_device(next(iter(configs.values())).parallel.device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "ranks": world_size(),
        "torch": torch.__version__,
        "peer": peer,
        "rows": rows,
    }


def _measured(config: RunConfig, steps: int) -> dict[str, Any]:
    """One recipe's figures; the model is gone afterwards."""
    begun = time.perf_counter()
    device = pick_device(config.parallel.device)
    layout = check_layout(config, world_size())
    world = join_run(config)
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer = build_trainer(config, world, layout)
        built = time.perf_counter() - begun
        return {"build_seconds": built, **_steps(trainer, steps, begun)}
    finally:
        leave()
        trainer = None  # type: ignore[assignment]  # the next recipe needs its memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _steps(trainer: Trainer, steps: int, begun: float) -> dict[str, Any]:
    device = trainer.world.device
    iterators = trainer.batches(0)
    seconds, losses = [], []

    def one(*, go_on: bool) -> None:
        start = time.perf_counter()
        trainer.binding.apply(trainer.progress)
        losses.append(train_step(trainer, iterators, go_on=go_on)["loss"])
        seconds.append(time.perf_counter() - start)

    one(go_on=True)
    first = time.perf_counter() - begun
    for number in range(WARM + steps, 0, -1):
        one(go_on=number > 1)
    # The last step is read without another one behind it: its wait is shorter than a step where launching a
    # graph takes the host as long as most of the graph.
    timed = seconds[WARM:-1]
    tokens = trainer.config.train.global_batch * trainer.config.model.seq_length
    rates = sorted(tokens / s for s in timed)
    median = statistics.median(rates)
    found: dict[str, Any] = {
        "backend": trainer.backend_choice,
        "graph": trainer.replays.reason or "captured",
        "tokens_per_second": median,
        "lowest": rates[0],
        "highest": rates[-1],
        "step_ms": 1000 * statistics.median(timed),
        "first_step_seconds": first,
        "memory_gib": memory_gib(device),
        "parameters": trainer.parameters,
        "losses": losses,
    }
    peak = peak_flops(device)
    if peak is not None:
        found["mfu"] = median * flops_of(trainer) / peak / trainer.world.size
        found["mfu_fp8"] = found["mfu"] / 2
    if device.type == "cuda":
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for number in range(PROFILED, 0, -1):
                one(go_on=number > 1)
            torch.cuda.synchronize()
        found |= _profiled(profiled, found["step_ms"])
    return found


def _profiled(profiled: profile, step_ms: float) -> dict[str, Any]:
    results: Any = profiled.profiler
    kernels: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": e.name(), "ts": e.start_ns() / 1e3}
        | {"dur": e.duration_ns() / 1e3}
        for e in results.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    times = overlap(kernels)
    by_name: dict[str, tuple[float, int]] = {}
    for kernel in kernels:
        ms, count = by_name.get(kernel["name"], (0.0, 0))
        by_name[kernel["name"]] = ms + kernel["dur"] / 1e3 / PROFILED, count + 1
    busy = (times["compute_ms"] + times["exposed_ms"]) / PROFILED
    return {
        "kernels": len(kernels) / PROFILED,
        "busy_ms": busy,
        "busy": busy / step_ms,
        "exposed_ms": times["exposed_ms"] / PROFILED,
        "hidden_ms": times["hidden_ms"] / PROFILED,
        "shares": shares((name, ms) for name, (ms, _) in by_name.items()),
        "longest": [
            {"kernel": name[:160], "ms": ms, "count": count / PROFILED}
            for name, (ms, count) in sorted(by_name.items(), key=lambda item: -item[1][0])[:40]
        ],
    }


def shares(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of the time of (name, ms) that each kind of kernel takes; kinds without any are left out."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, ms in kernels:
        found[kind_of(name)] += ms
    total = sum(found.values())
    return {kind: ms / total for kind, ms in found.items() if ms} if total else {}


def table(found: Mapping[str, Any]) -> Any:
    """The rows as rich tables: speeds, and where the GPU's time goes."""
    from rich.console import Group
    from rich.table import Table

    rows: Sequence[Mapping[str, Any]] = found["rows"]
    speeds = Table(title=f"{found['ranks']} x {found['device']}: whole training steps")
    for column in ("recipe", "tokens/s", "spread", f"of {rows[0]['recipe']}", "MFU", "GiB"):
        speeds.add_column(column, justify="left" if column == "recipe" else "right")
    for column in ("kernels", "GPU busy", "first step s", "graph"):
        speeds.add_column(column, justify="right")
    for r in rows:
        spread = (r["highest"] - r["lowest"]) / r["tokens_per_second"]
        speeds.add_row(
            r["recipe"], f"{r['tokens_per_second']:,.0f}", f"{spread:.1%}", f"{r['of_first']:.2f}",
            f"{r['mfu']:.1%}" if "mfu" in r else "", f"{r['memory_gib']:.1f}",
            f"{r['kernels']:,.0f}" if "kernels" in r else "", f"{r['busy']:.0%}" if "busy" in r else "",
            f"{r['first_step_seconds']:.0f}", "yes" if r["graph"] == "captured" else "no",
        )  # fmt: skip
    kinds = [kind for kind in KINDS if any(kind in r.get("shares", {}) for r in rows)]
    if not kinds:
        return Group(speeds, *_notes(found))
    where = Table(title="share of the GPU's time")
    where.add_column("recipe")
    for kind in kinds:
        where.add_column(kind, justify="right")
    for r in rows:
        where.add_row(r["recipe"], *(f"{r['shares'].get(kind, 0):.1%}" for kind in kinds))
    return Group(speeds, where, *_notes(found))


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{r['recipe']}: no graph, {r['graph']}" for r in found["rows"] if r["graph"] != "captured"
    ]
    return notes + ([f"another run's figure: {found['peer']}"] if found["peer"] else [])
