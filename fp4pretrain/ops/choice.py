"""Which backends are here, what each refuses of a plan, and the one that a run takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist

from fp4pretrain.errors import UserError, first_line
from fp4pretrain.ops.backend import Backend
from fp4pretrain.ops.cpp_backend import CppBackend
from fp4pretrain.ops.engine_backend import EngineBackend
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import GEMMS, OPERANDS, Plan, Recipe


def available(*, mxfp4_emulation: str = "fp8") -> dict[str, Backend]:
    """All backends by name, fastest first: the order in which ``auto`` tries them, but for ``ENGINE``.

    ``mxfp4_emulation``: fp8 or bf16; see ``TritonBackend``.
    """
    found: list[Backend] = []
    if without_triton() is None:
        from fp4pretrain.ops.native_backend import NativeBackend
        from fp4pretrain.ops.triton_backend import TritonBackend

        found += [
            NativeBackend(mxfp4_emulation=mxfp4_emulation),
            TritonBackend(mxfp4_emulation=mxfp4_emulation),
        ]
    return {b.name: b for b in (*found, EngineBackend(), CppBackend(), ReferenceBackend())}


# Another project's arithmetic: a run gets it where its config names it.
ENGINE = EngineBackend.name

# The backends whose kernels are written in Triton.
TRITON_BACKENDS = ("native", "triton")


@cache
def without_triton() -> str | None:
    """Why Triton's backends are not here, in one clause; None where they are.

    A Triton that cannot be imported is marked as absent for the rest of the process: torch and
    megatron-core do without one that is missing, but not without one that raises, say, OSError.
    """
    try:
        import triton  # noqa: F401
        import triton.language  # noqa: F401
    except Exception as error:  # a package that is half there raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed"
        sys.modules["triton"] = None  # type: ignore[assignment]
        reason = first_line(error)
        return f"Triton is installed and cannot be imported: {reason}"
    return None


def refusals(
    backend: Backend,
    recipes: Sequence[Recipe],
    device: torch.device,
    *,
    gemms: Sequence[str] = GEMMS,
) -> list[str]:
    """Why the backend cannot run the recipes' GEMMs on the device: clauses, none if it can. What holds for
    every GEMM of a recipe is said once."""
    reasons: dict[str, None] = {}
    for recipe in recipes:
        alike = {backend.why_not(recipe.gemm(name), device) for name in gemms}
        if len(gemms) > 1 and len(alike) == 1 and None not in alike:
            reasons |= {str(reason): None for reason in alike}
            continue
        for name in gemms:
            gemm = recipe.gemm(name)
            for operand, spec in zip(OPERANDS[name], gemm.specs, strict=True):
                reason = backend.why_not_cast(spec, device)
                if reason:
                    reasons[f"{name} {operand}: {reason}"] = None
            reason = backend.why_not(gemm, device)
            if reason:
                reasons[f"{name}: {reason}"] = None
    return list(reasons)


def choose(
    name: str,
    plan: Plan,
    device: torch.device,
    *,
    mxfp4_emulation: str = "fp8",
    group: dist.ProcessGroup | None = None,
) -> tuple[Backend, str]:
    """The backend for every recipe of a plan on a device, and one line that says why, and what multiplies.

    A named backend that cannot run raises UserError; ``auto`` takes the first that can, never ``ENGINE``.
    Nothing falls back silently. ``group``: the ranks that decide together; what one refuses, all do.
    """
    backends = available(mxfp4_emulation=mxfp4_emulation)
    missing = without_triton()
    if name in TRITON_BACKENDS and missing is not None:
        raise UserError(f"precision.backend: {name} needs Triton ({missing}); use auto")
    if name != "auto" and name not in backends:
        raise UserError(
            f"precision.backend: {name!r} is not here; choose auto, {', '.join(backends)}"
        )
    wanted = [n for n in backends if n != ENGINE] if name == "auto" else [name]
    recipes = plan.recipes()
    refused = _agreed({n: refusals(backends[n], recipes, device) for n in wanted}, group)
    passed = [] if missing is None else [f"{name} ({missing})" for name in TRITON_BACKENDS]
    for candidate in wanted:
        reasons = refused[candidate]
        if not reasons:
            how = _instructions(backends[candidate], plan.recipe, device)
            asked = "asked for" if name != "auto" else "auto"
            why = f"; not {', '.join(passed)}" if passed else ""
            return backends[candidate], f"backend {candidate} ({asked}{why}): {how}"
        if name != "auto":
            raise UserError(
                f"precision.backend: {name} cannot run this recipe on {device.type} "
                f"({'; '.join(reasons)}); use auto"
            )
        passed.append(f"{candidate} ({reasons[0]})")
    raise UserError(f"precision.backend: none can run this recipe: {', '.join(passed)}")


def _agreed(refused: dict[str, list[str]], group: dist.ProcessGroup | None) -> dict[str, list[str]]:
    """What any rank refuses, the same on all of them."""
    if group is None or group.size() == 1:
        return refused
    gathered: list[dict[str, list[str]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(gathered, refused, group=group)
    found: dict[str, list[str]] = {}
    for name in refused:
        found[name] = []
        for rank, theirs in enumerate(gathered):
            found[name] += [f"rank {rank}: {reason}" for reason in theirs[name]]
    everywhere = all(theirs == refused for theirs in gathered)
    return refused if everywhere else found


def _instructions(backend: Backend, recipe: Recipe, device: torch.device) -> str:
    """What multiplies the GEMMs of a recipe: one phrase if it is the same for all three."""
    found = {name: backend.instruction(recipe.gemm(name), device) for name in GEMMS}
    if len(set(found.values())) == 1:
        return found["fprop"]
    return ", ".join(f"{name} {text}" for name, text in found.items())
