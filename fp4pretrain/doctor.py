"""What this machine can run: a recipe's GEMMs by backend, with the instruction or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fp4pretrain.numerics import FORMATS
from fp4pretrain.ops.choice import TRITON_BACKENDS, available, choose, refusals, without_triton
from fp4pretrain.precision import GEMMS, Plan, Recipe


def device_here() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def examine(
    recipe: Recipe, device: torch.device, *, mxfp4_emulation: str = "fp8"
) -> list[tuple[str, str, bool, str]]:
    """(backend, GEMM, can run, instruction or reason) for every backend, ``auto``'s order."""
    missing = without_triton()
    absent = () if missing is None else TRITON_BACKENDS
    rows = [(name, gemm, False, str(missing)) for name in absent for gemm in GEMMS]
    for backend in available(mxfp4_emulation=mxfp4_emulation).values():
        for name in GEMMS:
            reasons = refusals(backend, [recipe], device, gemms=(name,))
            text = backend.instruction(recipe.gemm(name), device) if not reasons else reasons[0]
            text = text.removeprefix(f"{name}: ")
            rows.append((backend.name, name, not reasons, text))
    return rows


def recipes_table(names: Sequence[str], plans: Sequence[Plan], device: torch.device) -> Any:
    """Which backend ``precision.backend=auto`` takes for every recipe, and what multiplies there."""
    from rich.table import Table

    shown = Table(title="every recipe here")
    for column in ("precision", "backend", "4 bits are", "multiplied by"):
        shown.add_column(column)
    for name, plan in zip(names, plans, strict=True):
        backend, why = choose("auto", plan, device)
        fp4 = any(FORMATS[s.format].element.bits == 4 for _, _, s in plan.recipe.operands())
        how = "native" if backend.name == "native" else "emulated"
        shown.add_row(name, backend.name, how if fp4 else "-", why.rpartition("): ")[2])
    return shown


def table(recipe_name: str, recipe: Recipe, *, mxfp4_emulation: str = "fp8") -> Any:
    """``examine`` as a rich table, on the device at hand."""
    from rich.table import Table

    device = device_here()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shown = Table(title=f"precision={recipe_name} on {name}, torch {torch.__version__}")
    for column in ("backend", "GEMM", "runs", "by, or why not"):
        shown.add_column(column)
    for backend, gemm, runs, text in examine(recipe, device, mxfp4_emulation=mxfp4_emulation):
        shown.add_row(backend, gemm, "yes" if runs else "no", text)
    return shown
