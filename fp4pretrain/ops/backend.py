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

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import watching
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand
from fp4pretrain.precision import Gemm, Recipe

# Given amaxes (scalars or vectors, fp32) of which other ranks hold a part, returns the whole's.
ReduceAmax = Callable[[Sequence[Any]], Sequence[Any]]


class Backend(Protocol):
    """Who casts and multiplies. All methods take 2D tensors on the backend's device."""

    name: str

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        """None if this backend can run the GEMM on the device, otherwise the reason in one clause."""

    def why_not_cast(self, spec: QuantSpec, device: torch.device) -> str | None:
        """None if this backend can make an operand by ``spec``, otherwise the reason in one clause."""

    def instruction(self, gemm: Gemm, device: torch.device) -> str:
        """What multiplies there, for people: a matrix instruction, or the library that picks one."""

    def quantize(
        self, x: Tensor, casts: Sequence[Cast], reduce_amax: ReduceAmax | None = None
    ) -> list[Any]:
        """One ``Operand`` of x [rows, cols] for each cast, from one read of x where the backend can.

        ``reduce_amax`` is called at most once, with the amaxes (after rotation; fp32: a scalar for
        one scale a tensor, [rows] for one a row) of the casts that are ``shared``, in order, and
        returns what to use in their place: tensor parallelism all-reduces them there.
        """

    def gemm(
        self,
        a: Any,
        b: Any,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Tensor | None = None,
        fast_accum: bool = False,
    ) -> Tensor:
        """a @ b.T as ``out_dtype``, or added in FP32 to ``accumulate_into``, which is returned.

        ``fast_accum``: FP8 tensor cores may hold the sum in their own registers, about 14 bits wide.
        """

    def counters(self, recipes: Sequence[Recipe], device: torch.device) -> dict[str, int]:
        """What this process counted since it started, by the names of metrics rows.

        The names depend on recipes and device alone, so that ranks agree on them. May wait for the
        device: read it where a row is written, not in every step.
        """


def cast_operands(
    backend: Backend,
    x: Tensor,
    casts: Sequence[Cast],
    *,
    amax_group: dist.ProcessGroup | None = None,
) -> list[Operand]:
    """Operands of x [rows, cols], one for each cast; shown to the watch that is attached, if any.

    ``amax_group``: the amaxes of casts that are ``shared`` are all-reduced (max) over this group, so
    that every shard of a tensor is cast by the scales of the whole tensor.
    """
    operands = unwatched_operands(backend, x, casts, amax_group=amax_group)
    if watching.attached is not None:
        watching.attached(watching.Seen(backend, x, casts, operands, amax_group))
    return operands


def unwatched_operands(
    backend: Backend,
    x: Tensor,
    casts: Sequence[Cast],
    *,
    amax_group: dist.ProcessGroup | None = None,
) -> list[Operand]:
    """``cast_operands`` for a watch itself, which would otherwise be shown its own casts."""
    if amax_group is None or amax_group.size() == 1 or not any(c.shared for c in casts):
        return backend.quantize(x, casts)

    def reduce_amax(amaxes: Sequence[Tensor]) -> Sequence[Tensor]:
        if not amaxes:
            return amaxes
        flat = torch.cat([a.reshape(-1) for a in amaxes])
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=amax_group)
        parts = flat.split([a.numel() for a in amaxes])
        return [p.reshape(a.shape) for p, a in zip(parts, amaxes, strict=True)]

    return backend.quantize(x, casts, reduce_amax)
