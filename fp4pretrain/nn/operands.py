"""From a recipe and a moment to the six casts of one linear, and the casts of its weight, kept.

Which operands a tensor-parallel rank holds only a shard of, and where that shard sits:

    parallel   x (fprop, wgrad)     w (fprop, dgrad)     dy (dgrad, wgrad)
    column     whole                rows of n            columns of n
    row        columns of k         columns of k         whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp4pretrain.ops import Cast, NoiseKeys, cast_operands
from fp4pretrain.ops.keys import Placement
from fp4pretrain.precision import Recipe

if TYPE_CHECKING:
    from fp4pretrain.nn.gemms import LinearCall


@dataclass(frozen=True)
class Shard:
    """Which part of a linear [n, k] this rank holds. ``n`` and ``k`` place it in the whole."""

    parallel: str  # column | row
    n: Placement = (0, 0, 0)
    k: Placement = (0, 0, 0)


@dataclass(frozen=True)
class LinearCasts:
    """The six casts of one linear at one moment, whose they are, and which tensors are shards."""

    recipe: Recipe
    fprop_x: Cast
    fprop_w: Cast
    dgrad_dy: Cast
    dgrad_w: Cast
    wgrad_dy: Cast
    wgrad_x: Cast
    x_sharded: bool
    dy_sharded: bool
    global_amax: bool


@dataclass(frozen=True)
class _Prepared:
    """The casts of one linear as first made (their recipe was found by its identity: they keep it
    alive), and those that every moment draws anew."""

    casts: LinearCasts
    drawn: tuple[tuple[str, str, bool, bool], ...]  # GEMM, operand; has it noise, new signs


_PREPARED: dict[tuple, _Prepared] = {}
_MOST_PREPARED = 1 << 14


def linear_casts(
    recipe: Recipe, keys: NoiseKeys, shard: Shard, *, global_amax: bool
) -> LinearCasts:
    """The casts of ``recipe`` for the shard, with the noise and signs that ``keys`` give.

    Called before every forward of every linear, and most of it is the same each time: only noise,
    and signs that are redrawn, are made anew.
    """
    key = id(recipe), keys.seed, keys.layer, keys.linear, shard, global_amax
    prepared = _PREPARED.get(key)
    if prepared is None:
        casts = _linear_casts(recipe, keys, shard, global_amax=global_amax)
        if len(_PREPARED) >= _MOST_PREPARED:
            _PREPARED.clear()
        draws = [
            (g, o, spec.stochastic, recipe.gemm(g).rotation.resample in ("step", "gemm"))
            for g, o, spec in recipe.operands()
        ]
        _PREPARED[key] = _Prepared(casts, tuple(d for d in draws if d[2] or d[3]))
        return casts
    if not prepared.drawn:
        return prepared.casts
    casts = object.__new__(LinearCasts)
    casts.__dict__.update(prepared.casts.__dict__)
    for gemm, operand, stochastic, resampled in prepared.drawn:
        cast: Cast = casts.__dict__[f"{gemm}_{operand}"]
        noise, signs = None, cast.signs
        if stochastic:
            row, col = _place(gemm, operand, shard)
            noise = keys.noise(gemm, operand, row=row, col=col)
        if resampled:
            signs = keys.signs(gemm, recipe.gemm(gemm).rotation)
        casts.__dict__[f"{gemm}_{operand}"] = cast.drawn(noise, signs)
    return casts


def _linear_casts(
    recipe: Recipe, keys: NoiseKeys, shard: Shard, *, global_amax: bool
) -> LinearCasts:
    def cast(gemm: str, operand: str, *, transpose: bool) -> Cast:
        spec = recipe.operand(gemm, operand)
        rotation = recipe.gemm(gemm).rotation
        noise = None
        if spec.stochastic:
            row, col = _place(gemm, operand, shard)
            noise = keys.noise(gemm, operand, row=row, col=col)
        return Cast(
            spec=spec,
            transpose=transpose,
            rotation_size=rotation.size if rotation.active else 0,
            signs=keys.signs(gemm, rotation),
            noise=noise,
            kept=(gemm, operand) == ("wgrad", "x"),
        )

    return LinearCasts(
        recipe=recipe,
        fprop_x=cast("fprop", "x", transpose=False),
        fprop_w=cast("fprop", "w", transpose=False),
        dgrad_dy=cast("dgrad", "dy", transpose=False),
        dgrad_w=cast("dgrad", "w", transpose=True),
        wgrad_dy=cast("wgrad", "dy", transpose=True),
        wgrad_x=cast("wgrad", "x", transpose=True),
        x_sharded=shard.parallel == "row",
        dy_sharded=shard.parallel == "column",
        global_amax=global_amax,
    )


def _place(gemm: str, operand: str, shard: Shard) -> tuple[Placement, Placement]:
    """(row, column) placement of an operand's shard, in the operand's own orientation."""
    placed = {"t": (0, 0, 0), "n": shard.n, "k": shard.k}
    axes = _AXES[gemm, operand]
    return placed[axes[0]], placed[axes[1]]


# Rows and columns of the six operands: tokens, output features, input features.
_AXES = {
    ("fprop", "x"): "tk",
    ("fprop", "w"): "nk",
    ("dgrad", "dy"): "tn",
    ("dgrad", "w"): "kn",
    ("wgrad", "dy"): "nt",
    ("wgrad", "x"): "kt",
}


class WeightCache:
    """The casts of one weight, made once a step and used by every microbatch.

    Stale is impossible by two keys: the clock's ``weights_version``, which the trainer advances
    after each optimizer step and load, and the casts themselves (a switched recipe or freshly drawn
    signs are another cast). A call without gradients (activation recompute makes one before each
    that has them) asks for fprop's alone and leaves dgrad's in place. Casts to BF16 are not kept:
    they are the weight.
    """

    def __init__(self) -> None:
        self._moment: tuple[int, int] | None = None
        self._kept: dict[Cast, Any] = {}

    def operands(self, weight: torch.Tensor, call: LinearCall) -> tuple[Any, Any]:
        """(fprop's w, dgrad's w or None when no gradient will be asked for)."""
        both = (call.casts.fprop_w, call.casts.dgrad_w)
        wanted = both if call.training else both[:1]
        moment = (call.weights_version, weight.data_ptr())
        if moment != self._moment:
            self._moment, self._kept = moment, {}
        found = dict(self._kept)
        missing = [cast for cast in dict.fromkeys(wanted) if cast not in found]
        if missing:
            made = cast_operands(
                call.backend, weight.detach(), missing, amax_group=call.group_for(True)
            )
            found |= zip(missing, made, strict=True)
            self._kept = {c: o for c, o in found.items() if c in both and c.spec.quantized}
        return found[both[0]], found[both[1]] if call.training else None
