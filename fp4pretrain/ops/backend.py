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
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import watching
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand
from fp4pretrain.ops.site_state import SiteState
from fp4pretrain.ops.split import SumOperand, pairs, split_operand
from fp4pretrain.precision import Gemm, Recipe

if TYPE_CHECKING:
    from fp4pretrain.ops.handed import Awaited

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
        self,
        x: Tensor,
        casts: Sequence[Cast],
        reduce_amax: ReduceAmax | None = None,
        partners: Sequence[Operand | None] = (),
    ) -> list[Any]:
        """One ``Operand`` of x [rows, cols] for each cast, from one read of x where the backend can.

        ``reduce_amax`` is called at most once, with the amaxes (after rotation; fp32: a scalar for
        one scale a tensor, [rows] for one a row) of the casts that ask (``Cast.asks``), in order, and
        returns what to use in their place: tensor parallelism all-reduces them there, and amaxes of
        earlier steps replace them.

        ``partners``: one a cast or none at all, the operand that it will be multiplied with where that
        exists already. What the two need together can be made on the way; no number depends on it.
        """

    def awaits(self, casts: Sequence[Cast], device: torch.device) -> Awaited | None:
        """What ``quantize`` of a tensor by these casts will ask of it, so that the kernel that writes the
        tensor can measure it (`handed`); None: nothing, or what no kernel measures on the way.

        ``casts`` whose signs are redrawn are not asked about.
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

    def counters(self, recipes: Sequence[Recipe], device: torch.device) -> dict[str, Tensor]:
        """What this process counted since it started, by the names of metrics rows.

        int64 scalars on the device. The names depend on recipes and device alone, so that ranks agree
        on them.
        """


def cast_operands(
    backend: Backend,
    x: Tensor,
    casts: Sequence[Cast],
    *,
    amax_group: dist.ProcessGroup | None = None,
    sites: SiteState | None = None,
    partners: Sequence[Operand | None] = (),
) -> list[Operand]:
    """Operands of x [rows, cols], one for each cast; shown to the watch that is attached, if any.

    Args:
        partners: as in ``Backend.quantize``.
        amax_group: the amaxes of casts that are ``shared`` are all-reduced (max) over this group, so
            that every shard of a tensor is cast by the scales of the whole tensor.
        sites: who answers casts whose ``spec.amax`` is not current, remembers and counts.
    """
    caster = Caster(backend, amax_group, sites)
    operands = caster.operands(x, casts, partners)
    if watching.attached is not None:
        watching.attached(watching.Seen(caster, x, casts, operands))
    return operands


class Caster:
    """Casts tensors on a backend by the amaxes of their ranks and of earlier steps, unwatched.

    Arguments as in ``cast_operands``.
    """

    def __init__(
        self,
        backend: Backend,
        amax_group: dist.ProcessGroup | None = None,
        sites: SiteState | None = None,
        *,
        record: bool = True,
    ) -> None:
        self.backend = backend
        self.group = amax_group if amax_group is not None and amax_group.size() > 1 else None
        self.sites = sites
        self._record = record and sites is not None

    def unrecorded(self) -> Caster:
        """The same, leaving nothing behind for later steps."""
        return Caster(self.backend, self.group, self.sites, record=False)

    def operands(
        self, x: Tensor, casts: Sequence[Cast], partners: Sequence[Operand | None] = ()
    ) -> list[Operand]:
        """One operand of x [rows, cols] for each cast; ``partners`` as in ``Backend.quantize``."""
        if self._record and self.sites is not None and self.sites.recording:
            for cast in casts:
                self.sites.cast[cast.site, cast.spec.format] += 1
        whole = [cast for cast in casts if cast.spec.split == "none"]
        if len(whole) == len(casts):
            return self._cast(x, casts, partners)
        made = dict(zip(map(id, whole), self._cast(x, whole), strict=True)) if whole else {}
        for cast in casts:
            if cast.spec.split != "none":
                made[id(cast)] = split_operand(x, cast, self._cast)
        return [made[id(cast)] for cast in casts]

    def _cast(
        self, x: Tensor, casts: Sequence[Cast], partners: Sequence[Operand | None] = ()
    ) -> list[Operand]:
        asking = [
            c for c in casts if (c.shared and self.group is not None) or c.spec.amax != "current"
        ]
        if not asking:
            return self.backend.quantize(x, casts, partners=partners)
        asking = [c for c in casts if c.asks and c.spec.amax_span != "block"]
        return self.backend.quantize(x, casts, partial(self._answer, asking), partners)

    def _answer(self, casts: Sequence[Cast], measured: Sequence[Tensor]) -> Sequence[Tensor]:
        """The amaxes to scale by, of casts that measured ``measured``."""
        found = list(measured)
        shared = [i for i, cast in enumerate(casts) if cast.shared]
        if shared and self.group is not None:
            whole = _all_reduced([found[i] for i in shared], self.group)
            for i, amax in zip(shared, whole, strict=True):
                found[i] = amax
        for i, cast in enumerate(casts):
            if cast.spec.amax != "current":
                assert self.sites is not None
                record = self._record and self.sites.recording
                found[i] = self.sites.used(cast, found[i], record=record)
        return found


def multiply(
    backend: Backend,
    a: Operand,
    b: Operand,
    *,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """a @ b.T on a backend, where operands may be sums of terms; arguments as in ``Backend.gemm``."""
    if not isinstance(a, SumOperand) and not isinstance(b, SumOperand):
        return backend.gemm(
            a, b, out_dtype=out_dtype, accumulate_into=accumulate_into, fast_accum=fast_accum
        )
    total = accumulate_into
    for first, second in pairs(a, b):
        total = backend.gemm(
            first,
            second,
            out_dtype=torch.float32,
            accumulate_into=total,
            fast_accum=fast_accum,
        )
    assert total is not None
    return total if accumulate_into is not None else total.to(out_dtype)


def _all_reduced(amaxes: Sequence[Tensor], group: dist.ProcessGroup | None) -> Sequence[Tensor]:
    flat = torch.cat([a.reshape(-1) for a in amaxes])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
    parts = flat.split([a.numel() for a in amaxes])
    return [p.reshape(a.shape) for p, a in zip(parts, amaxes, strict=True)]
