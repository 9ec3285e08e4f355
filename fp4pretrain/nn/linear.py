"""Column- and row-parallel linears: megatron-core's, with our three GEMMs.

Only ``_forward_impl`` is ours. Initialization, tensor-parallel attributes, DDP, the distributed
optimizer, pipeline stages, recompute and sharded checkpoints are inherited. BF16, FP8 and FP4 are
recipes of this one class, so runs that are compared differ in the recipe alone.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """A linear's place in the model: which recipe it follows, who computes, and its noise keys."""

    backend: Backend
    clock: Clock
    layer: int = 0
    linear: int = 0
    recipe: Recipe = BF16
    global_amax: bool = True
    sites: SiteState | None = None


class QuantLinear:
    """Mixed into a megatron-core linear. Unbound it cannot run: ``bind`` comes with the model."""

    parallel: str
    tp_group: Any  # megatron-core's linear sets it
    weight: Any  # and this one: [n, k], None for a tied head
    binding: Binding | None = None
    sequence_parallel: bool  # and this
    _cache: WeightCache
    _awaited: dict[str, tuple[Recipe, Awaited | None]]
    gathered: str  # which of _READ sequence parallelism gathers from other ranks

    def bind(self, binding: Binding) -> None:
        """Attach recipe, backend and clock. Recipes may be swapped at any step after that."""
        self.binding = binding
        self._cache = WeightCache()
        self._awaited = {}

    @property
    def bound(self) -> Binding:
        """The binding. Raises RuntimeError before ``bind``."""
        if self.binding is None:
            raise RuntimeError(f"{type(self).__name__} was called before bind()")
        return self.binding

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
        binding = self.bound
        call = LinearCall(
            casts=self._casts(),
            backend=binding.backend,
            weights=self._cache,
            weights_version=binding.clock.weights_version,
            tp_group=self.tp_group,  # megatron-core's row-parallel call passes none
            gather=sequence_parallel,
            allreduce_dgrad=allreduce_dgrad,
            training=torch.is_grad_enabled(),
            sites=binding.sites,
        )
        return QuantLinearFunction.apply(input, weight, bias, call)

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

    def awaits(self, tensor: str) -> Awaited | None:
        """What this linear will ask of the tensor that it is given: its input ("x") or its output's
        gradient ("dy"), by the recipe of now; whoever writes that tensor may measure it (`ops.handed`).

        None: nothing, or what no kernel measures, or the linear reads a copy that ranks gather.
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
        """Which part of the whole weight this rank holds."""
        raise AssertionError("the column- and row-parallel classes say it")


class ColumnParallelQuantLinear(QuantLinear, ColumnParallelLinear):
    """Y = X A, A sharded along its output features."""

    parallel = "column"
    gathered = "x"

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
