"""The casts of a linear's weight, made once a step and used by every microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fp4pretrain.ops import Cast, LinearCasts, Operand

Make = Callable[[Tensor, Sequence[Cast]], list[Operand]]


class WeightCache:
    """Operands of one weight [n, k], or of some of its ``rows``: fprop's, and dgrad's of the transpose.

    Three keys rule out a stale operand: the clock's ``weights_version``, which the trainer advances after
    each optimizer step and load; the weight's memory and PyTorch's own version of it, which any
    in-place edit advances; and the casts themselves (a switched recipe or freshly drawn signs are
    another cast). Casts to BF16 are not held: they are the weight. Where dgrad's operand is fprop's
    transposed (2d tiles) and the backend can read it so, there is one.

    What changes every microbatch (``resample: gemm``) is made in the backward pass that needs it and
    not held: microbatches in flight would each hold their own.

    ``packed``: operands wait as a saved one does, packed where their format can be, and each GEMM expands
    them. Then dgrad's is fprop's transposed also where both are codes under one scale.
    """

    def __init__(self, rows: Tensor | None = None, *, packed: bool = False) -> None:
        self._rows = rows
        self._packed = packed
        self._moment: tuple[int, int, int] | None = None
        self._held: dict[Cast, Operand] = {}

    def forward(
        self, weight: Tensor, casts: LinearCasts, version: int, make: Make, *, backward_too: bool
    ) -> Operand:
        """fprop's w. ``backward_too``: dgrad's will be asked for, so both come from one read."""
        wanted = [casts.fprop_w]
        alone = casts.w_redrawn or self._shared(casts) or casts.dgrad_w.spec.source == "forward"
        if backward_too and not alone:
            wanted.append(casts.dgrad_w)
        return self._get(weight, casts, version, make, wanted)[casts.fprop_w]

    def backward(self, weight: Tensor, casts: LinearCasts, version: int, make: Make) -> Operand:
        """dgrad's w: the operand of the transposed weight [k, n], from w or from fprop's operand."""
        if casts.dgrad_w.spec.source == "forward":
            fprop = self._get(weight, casts, version, make, [casts.fprop_w])[casts.fprop_w]
            copied = fprop.dequantize()[:, : weight.shape[1]]
            if casts.w_redrawn:
                return make(copied, [casts.dgrad_w])[0]
            return self._get(weight, casts, version, make, [casts.dgrad_w], of=copied)[
                casts.dgrad_w
            ]
        if casts.w_redrawn:
            return make(self._cast_rows(weight), [casts.dgrad_w])[0]
        if self._shared(casts):
            fprop = self._get(weight, casts, version, make, [casts.fprop_w])[casts.fprop_w]
            # padding lies along the other axis of a transpose, so only whole blocks are shared
            n = len(weight if self._rows is None else self._rows)
            if fprop.shape == (n, weight.shape[1]) and not casts.dgrad_w.padding(n):
                turned = fprop.transposed()
                if turned is not None:
                    return turned
        return self._get(weight, casts, version, make, [casts.dgrad_w])[casts.dgrad_w]

    def _shared(self, casts: LinearCasts) -> bool:
        return casts.w_shared or (self._packed and casts.w_scaled_once)

    def _cast_rows(self, weight: Tensor) -> Tensor:
        """What is cast of a weight."""
        whole = weight.detach()
        return whole if self._rows is None else whole.index_select(0, self._rows)

    def _get(
        self,
        weight: Tensor,
        casts: LinearCasts,
        version: int,
        make: Make,
        wanted: list[Cast],
        *,
        of: Tensor | None = None,
    ) -> dict[Cast, Any]:
        """The held operands with those that are wanted, cast from ``of`` (the weight) if missing."""
        moment = version, weight.data_ptr(), weight._version
        if moment != self._moment:
            self._moment, self._held = moment, {}
        found = self._held
        missing = [cast for cast in dict.fromkeys(wanted) if cast not in found]
        if missing:
            asked = [replace(cast, saved=True) for cast in missing] if self._packed else missing
            made = make(self._cast_rows(weight) if of is None else of, asked)
            found = found | dict(zip(missing, made, strict=True))
            current = casts.fprop_w, casts.dgrad_w
            self._held = {c: o for c, o in found.items() if c in current and c.spec.quantized}
        return found
