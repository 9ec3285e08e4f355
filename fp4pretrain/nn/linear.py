"""Column- and row-parallel linears: megatron-core's, with our three GEMMs.

Only ``_forward_impl`` is ours. Initialization, tensor-parallel attributes, DDP, the distributed
optimizer, pipeline stages, recompute and sharded checkpoints are inherited. BF16, FP8 and FP4 are
recipes of this one class, so runs that are compared differ in the recipe alone.

A linear that a plan divides (attention's projections, where rules name q, k or v) has a ``LinearPart`` for
each part of its weight, bound to a recipe of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from fp4pretrain.nn.clock import Clock
from fp4pretrain.nn.gemms import LinearCall, QuantLinearFunction
from fp4pretrain.nn.weights import WeightCache
from fp4pretrain.ops import (
    Backend,
    Cast,
    LinearCasts,
    Shard,
    SiteState,
    lasting_casts,
    linear_casts,
)
from fp4pretrain.ops.backend import Caster
from fp4pretrain.precision import BF16, Recipe

if TYPE_CHECKING:
    from fp4pretrain.ops.handed import Awaited

_T = TypeVar("_T")
# The casts of a linear's input and of its output's gradient.
_READ = {"x": ("fprop_x", "wgrad_x"), "dy": ("dgrad_dy", "wgrad_dy")}


@dataclass
class Binding:
    """A linear's place in the model: which recipe it follows, who computes, and its noise keys.

    ``linear``: as in ``Site``. ``packed_weights``: how casts of the weight wait (`WeightCache`).
    """

    backend: Backend
    clock: Clock
    layer: int = 0
    linear: int = 0
    recipe: Recipe = BF16
    global_amax: bool = True
    sites: SiteState | None = None
    packed_weights: bool = False


class Bound:
    """What follows a recipe: a linear, or a part of one. Unbound it cannot run."""

    tp_group: Any
    weight: Any  # [n, k]: the linear's whole weight on this rank; None for a tied head
    rows: torch.Tensor | None = None  # int64: which rows of the weight; None: all
    binding: Binding | None = None
    _cache: WeightCache
    _awaited: dict[str, tuple[Recipe, Awaited | None]]

    def bind(self, binding: Binding) -> None:
        """Attach recipe, backend and clock. Recipes may be swapped at any step after that."""
        self.binding = binding
        self._cache = WeightCache(self.rows, packed=binding.packed_weights)
        self._awaited = {}

    @property
    def bound(self) -> Binding:
        """The binding. Raises RuntimeError before ``bind``."""
        if self.binding is None:
            raise RuntimeError(f"{type(self).__name__} was called before bind()")
        return self.binding

    def call(self, *, gather: bool, allreduce_dgrad: bool) -> LinearCall:
        """What one forward pass is given beside its tensors; arguments as in ``LinearCall``."""
        binding = self.bound
        return LinearCall(
            casts=self._casts(),
            backend=binding.backend,
            weights=self._cache,
            weights_version=binding.clock.weights_version,
            tp_group=self.tp_group,  # megatron-core's row-parallel call passes none
            gather=gather,
            allreduce_dgrad=allreduce_dgrad,
            training=torch.is_grad_enabled(),
            sites=binding.sites,
            rows=self.rows,
        )

    def _casts(self) -> LinearCasts:
        """The six casts of this moment."""
        return self._prepared(linear_casts)

    def _prepared(self, make: Callable[..., _T]) -> _T:
        """What ``linear_casts`` or ``lasting_casts`` makes of this linear, its recipe and its clock."""
        binding = self.bound
        return make(
            binding.recipe,
            binding.clock.moment,
            self._shard(),
            layer=binding.layer,
            linear=binding.linear,
            global_amax=binding.global_amax,
        )

    def weight_cast(self) -> Cast:
        """How fprop's GEMM takes the weight by the recipe of now."""
        return self._casts().fprop_w

    def cast_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """What fprop's GEMM reads of a weight [n, k] of this linear, in the weight's dtype.

        Collective over the tensor-parallel group where shards are scaled by the whole's amax; nothing is
        remembered or counted. Only for casts without a rotation.
        """
        binding = self.bound
        caster = Caster(binding.backend, self.tp_group, binding.sites, record=False)
        (operand,) = caster.operands(weight.detach(), [self.weight_cast()])
        return operand.dequantize()[:, : weight.shape[1]].to(weight.dtype)

    def _shard(self) -> Shard:
        """Which part of the whole weight (of this part of it) this rank holds."""
        raise AssertionError("the column- and row-parallel classes and parts say it")


class LinearPart(Bound):
    """The ``rows`` of a column-parallel linear's weight that follow a recipe of their own.

    Noise is drawn by an element's place in the part: all rows of the whole model's part, in their order,
    are one matrix, of which a rank holds as many as every other.
    """

    def __init__(self, whole: ColumnParallelQuantLinear, rows: torch.Tensor) -> None:
        self._whole, self.rows = whole, rows

    @property
    def tp_group(self) -> Any:  # type: ignore[override]
        """The linear's."""
        return self._whole.tp_group

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The linear's whole weight, of which the part has some rows."""
        return self._whole.weight

    def _shard(self) -> Shard:
        assert self.rows is not None
        group, local = self.tp_group, len(self.rows)
        return Shard("column", n=(group.rank() * local, 0, 0), split=group.size() > 1)


class QuantLinear(Bound):
    """Mixed into a megatron-core linear, which sets ``weight``, ``tp_group`` and ``sequence_parallel``."""

    parallel: str
    sequence_parallel: bool
    gathered: str  # which of _READ sequence parallelism gathers from other ranks
    parts: tuple[LinearPart, ...] = ()

    def divide(self, parts: Sequence[tuple[torch.Tensor, Binding]]) -> tuple[LinearPart, ...]:
        """Bind parts of the linear in place of the whole, column-parallel alone.

        ``parts``: rows of this rank's weight (int64; together all of them, in any order), and a binding.
        """
        assert isinstance(self, ColumnParallelQuantLinear)
        self.parts = tuple(LinearPart(self, rows) for rows, _ in parts)
        for part, (_, binding) in zip(self.parts, parts, strict=True):
            part.bind(binding)
        return self.parts

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        **_other_matmuls: Any,
    ) -> torch.Tensor:
        # The remaining keywords configure megatron-core's own matmul (apex's fused accumulation,
        # deferred embedding gradients): the three GEMMs here replace it.
        calls = tuple(
            one.call(gather=sequence_parallel, allreduce_dgrad=allreduce_dgrad)
            for one in self.parts or (self,)
        )
        return QuantLinearFunction.apply(input, weight, bias, calls)

    def awaits(self, tensor: str) -> Awaited | None:
        """What this linear will ask of the tensor that it is given: its input ("x") or its output's
        gradient ("dy"), by the recipe of now; whoever writes that tensor may measure it (`ops.handed`).

        None: nothing, or what no kernel measures, or the linear reads a copy that ranks gather, or it is
        divided into parts.
        """
        if self.binding is None or (self.sequence_parallel and tensor == self.gathered):
            return None
        recipe = self.binding.recipe
        found = self._awaited.get(tensor)
        if found is None or found[0] is not recipe:
            found = self._awaited[tensor] = recipe, self._asked(_READ[tensor])
        return found[1]

    def _asked(self, names: tuple[str, ...]) -> Awaited | None:
        casts, redrawn = self._prepared(lasting_casts)
        read = [n for n in names if getattr(casts, n).spec.source != "forward"]
        if redrawn.intersection(read):
            return None
        return self.bound.backend.awaits([getattr(casts, n) for n in read], self.weight.device)


class ColumnParallelQuantLinear(QuantLinear, ColumnParallelLinear):
    """Y = X A, A sharded along its output features."""

    parallel = "column"
    gathered = "x"
    skip_bias_add: bool

    def apart(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(product without bias, bias or None), for a caller that adds the bias in a kernel of its own."""
        skips, self.skip_bias_add = self.skip_bias_add, True
        try:
            product, bias = self(x)
        finally:
            self.skip_bias_add = skips
        return product, bias

    def _shard(self) -> Shard:
        split = self.tp_group.size() > 1
        rank, local = self.tp_group.rank(), self.output_size_per_partition
        stride = getattr(self.weight, "partition_stride", 1) if self.weight is not None else 1
        if stride == 1:
            return Shard("column", n=(rank * local, 0, 0), split=split)
        part = local // stride
        n = rank * part, part, self.output_size // stride - part
        return Shard("column", n=n, split=split)


class RowParallelQuantLinear(QuantLinear, RowParallelLinear):
    """Y = X A, A sharded along its input features."""

    parallel = "row"
    gathered = "dy"

    def _shard(self) -> Shard:
        offset = self.tp_group.rank() * self.input_size_per_partition
        return Shard("row", k=(offset, 0, 0), split=self.tp_group.size() > 1)
