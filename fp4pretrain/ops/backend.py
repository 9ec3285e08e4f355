"""The seam between what a GEMM computes and who computes it.

Every GEMM is ``out[m, n] = sum_k a[m, k] * b[n, k]``, both operands with the contraction axis last:

    GEMM    a                b                 contracts over
    fprop   x      [t, k]    w      [n, k]     k
    dgrad   dy     [t, n]    w.T    [k, n]     n
    wgrad   dy.T   [n, t]    x.T    [k, t]     t

A ``Cast`` says how one of them is made from the tensor in memory, so that a backend can make the
row-wise and the column-wise copy of one tensor from a single read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import Noise, QuantSpec
from fp4pretrain.precision import GEMMS, Gemm, Plan, Recipe


@dataclass(frozen=True)
class Cast:
    """How one operand is made from a tensor x [rows, cols].

    ``transpose``: the operand is x.T, contracted over x's rows. ``rotation_size`` 0 or 16 to 128:
    block Hadamard along the contraction axis, after multiplying by ``signs`` (None: no signs).
    ``noise`` keys stochastic rounding, in the operand's own coordinates. ``kept``: the operand waits
    for another pass, so a backend may hold it packed. Backends compare casts by value, so an operand
    made by an equal cast from an unchanged tensor can be reused.
    """

    spec: QuantSpec
    transpose: bool = False
    rotation_size: int = 0
    signs: tuple[int, ...] | None = None
    noise: Noise | None = None
    kept: bool = False

    @cached_property
    def kind(self) -> int:
        """A number for all but the draw (noise, signs): casts of one kind are launched alike."""
        parts = self.noise is not None and bool(self.noise.row_part or self.noise.col_part)
        signs = self.signs is not None
        how = self.spec, self.transpose, self.rotation_size, signs, parts, self.kept
        return _KINDS.setdefault(how, len(_KINDS))

    def drawn(self, noise: Noise | None, signs: tuple[int, ...] | None) -> Cast:
        """This cast with another draw of the same kind, faster than ``replace``."""
        cast = object.__new__(Cast)
        cast.__dict__.update(self.__dict__, noise=noise, signs=signs)
        return cast


_KINDS: dict[tuple, int] = {}


ReduceAmax = Callable[[torch.Tensor], torch.Tensor]


class Operand(Protocol):
    """One side of a GEMM, in whatever form its backend likes."""

    @property
    def shape(self) -> tuple[int, int]: ...


class Backend(Protocol):
    """Who casts and multiplies. All methods take 2D tensors on the backend's device."""

    name: str

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """What multiplies there, for people: a matrix instruction, or the library that picks one."""

    def quantize(
        self, x: torch.Tensor, casts: Sequence[Cast], reduce_amax: ReduceAmax | None = None
    ) -> list[Any]:
        """One operand of x [rows, cols] for each cast, from one read of x where the backend can.

        ``reduce_amax`` is called once with the tensor amaxes (after rotation; fp32, one for each
        cast whose format has a tensor scale, in order) and returns what to use in their place:
        tensor parallelism all-reduces them there. It is not called when no cast has one.
        """

    def gemm(
        self,
        a: Any,
        b: Any,
        *,
        out_dtype: torch.dtype,
        accumulate_into: torch.Tensor | None = None,
        fast_accum: bool = False,
    ) -> torch.Tensor:
        """a @ b.T as ``out_dtype``, or added in FP32 to ``accumulate_into``, which is returned.

        ``fast_accum``: FP8 tensor cores may hold the sum in their own registers, about 14 bits wide.
        """

    def counters(self, recipe: Recipe, device: torch.device) -> dict[str, int]:
        """What this process counted since it started, by the names of metrics rows.

        The names depend on recipe and device alone, so that ranks agree on them. May wait for the
        device: read it where a row is written, not in every step.
        """


def cast_operands(
    backend: Backend,
    x: torch.Tensor,
    casts: Sequence[Cast],
    *,
    amax_group: dist.ProcessGroup | None = None,
) -> list[Any]:
    """Operands of x [rows, cols], one for each cast.

    ``amax_group``: the tensor amax is all-reduced (max) over this group, so that every shard of a
    tensor is cast by the scale of the whole tensor.
    """
    if amax_group is None or amax_group.size() == 1:
        return backend.quantize(x, casts)

    def reduce_amax(amax: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=amax_group)
        return amax

    return backend.quantize(x, casts, reduce_amax)


def available(*, mxfp4_emulation: str = "fp8") -> dict[str, Backend]:
    """All backends by name, fastest first: the order in which ``auto`` tries them.

    ``mxfp4_emulation``: fp8 or bf16; see ``TritonBackend``.
    """
    from fp4pretrain.ops.reference import ReferenceBackend

    found: list[Backend] = []
    if without_triton() is None:
        from fp4pretrain.ops.native_backend import NativeBackend
        from fp4pretrain.ops.triton_backend import TritonBackend

        found += [
            NativeBackend(mxfp4_emulation=mxfp4_emulation),
            TritonBackend(mxfp4_emulation=mxfp4_emulation),
        ]
    return {b.name: b for b in (*found, ReferenceBackend())}


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"Triton is installed and cannot be imported: {reason}"
    return None


def refusals(backend: Backend, recipe: Recipe, device: torch.device) -> list[str]:
    """Why the backend cannot run the recipe on the device: one clause a GEMM, none if it can."""
    reasons = []
    for name in GEMMS:
        reason = backend.why_not(recipe.gemm(name), device)
        if reason:
            reasons.append(f"{name}: {reason}")
    return reasons


def choose(
    name: str, plan: Plan, device: torch.device, *, mxfp4_emulation: str = "fp8"
) -> tuple[Backend, str]:
    """The backend for a plan on a device, and one line that says why, and what multiplies.

    A named backend that cannot run raises UserError; ``auto`` takes the first that can. Nothing
    falls back silently.
    """
    backends = available(mxfp4_emulation=mxfp4_emulation)
    if name != "auto":
        missing = without_triton()
        if name in TRITON_BACKENDS and missing is not None:
            raise UserError(f"precision.backend: {name} needs Triton ({missing}); use auto")
        if name not in backends:
            raise UserError(
                f"precision.backend: {name!r} is not here; choose auto, {', '.join(backends)}"
            )
        reasons = refusals(backends[name], plan.recipe, device)
        if reasons:
            raise UserError(
                f"precision.backend: {name} cannot run this recipe on {device.type} "
                f"({'; '.join(reasons)}); use auto"
            )
        how = _instructions(backends[name], plan.recipe, device)
        return backends[name], f"backend {name} (asked for): {how}"
    missing = without_triton()
    passed = [] if missing is None else [f"{name} ({missing})" for name in TRITON_BACKENDS]
    for backend in backends.values():
        reasons = refusals(backend, plan.recipe, device)
        if not reasons:
            why = f"; not {', '.join(passed)}" if passed else ""
            how = _instructions(backend, plan.recipe, device)
            return backend, f"backend {backend.name} (auto{why}): {how}"
        passed.append(f"{backend.name} ({reasons[0]})")
    raise UserError(f"precision.backend: none can run this recipe: {', '.join(passed)}")


def _instructions(backend: Backend, recipe: Recipe, device: torch.device) -> str:
    """What multiplies the GEMMs of a recipe: one phrase if it is the same for all three."""
    found = {name: backend.instruction(recipe.gemm(name), device) for name in GEMMS}
    if len(set(found.values())) == 1:
        return found["fprop"]
    return ", ".join(f"{name} {text}" for name, text in found.items())
