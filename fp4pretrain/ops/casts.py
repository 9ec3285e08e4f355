"""The six casts of a linear: what its recipe, its place, its shard and the moment say about each operand.

Which operands a tensor-parallel rank holds only a shard of, and where that shard sits:

    parallel   x (fprop, wgrad)     w (fprop, dgrad)     dy (dgrad, wgrad)
    column     whole                rows of n            columns of n
    row        columns of k         columns of k         whole
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fp4pretrain.numerics import Noise, QuantSpec
from fp4pretrain.ops.keys import Moment, Placement, Site
from fp4pretrain.precision import OPERANDS, Recipe

_WHOLE: Placement = (0, 0, 0)


@dataclass(frozen=True)
class Cast:
    """How one operand is made from a tensor x [rows, cols].

    Attributes:
        spec: format, block, rounding, scale rule.
        site: whose cast it is; None where nobody asks (a benchmark of one tensor).
        transpose: the operand is x.T, contracted over x's rows.
        multiple: the contraction axis is padded with zeros to a multiple of this.
        rotation_size: 0, or 16 to 128: block Hadamard along the contraction axis, after multiplying
            by ``signs`` (None: no signs).
        rotated_fp32: the rotated operand stays in FP32 until it is cast; otherwise BF16.
        noise: keys stochastic rounding, in the operand's own coordinates.
        shared: its largest magnitudes are those of a whole tensor (or row) of which other ranks hold
            the rest, so they are reduced over those ranks.
        saved: the operand waits for another pass, so a backend may hold it packed.
        draw: where kernels read the noise's key and the signs of a captured step (a row of ``Draws``); None:
            they are those of ``noise`` and ``signs``.

    Backends compare casts by value, so an operand made by an equal cast from an unchanged tensor can
    be reused.
    """

    spec: QuantSpec
    site: Site | None = None
    transpose: bool = False
    multiple: int = 1
    rotation_size: int = 0
    rotated_fp32: bool = False
    signs: tuple[int, ...] | None = None
    noise: Noise | None = None
    shared: bool = False
    saved: bool = False
    draw: Tensor | None = field(default=None, compare=False)

    @property
    def asks(self) -> bool:
        """Whether a backend has to ask which amax the scales are made from."""
        return self.shared or self.spec.amax != "current"

    @cached_property
    def kind(self) -> int:
        """A number that is equal for casts that differ in site, noise and signs alone: they are launched
        alike."""
        parts = self.noise is not None and bool(self.noise.row_part or self.noise.col_part)
        how = (
            self.spec, self.transpose, self.multiple, self.rotation_size, self.rotated_fp32,
            self.signs is not None, parts, self.saved,
        )  # fmt: skip
        return _KINDS.setdefault(how, len(_KINDS))

    def drawn(
        self,
        noise: Noise | None,
        signs: tuple[int, ...] | None,
        draw: Tensor | None = None,
    ) -> Cast:
        """This cast with another draw of the same kind, faster than ``replace``."""
        cast = object.__new__(Cast)
        cast.__dict__.update(self.__dict__, noise=noise, signs=signs, draw=draw)
        return cast

    def padding(self, length: int) -> int:
        """Zeros to append to a contraction axis of this length."""
        return -length % self.multiple


_KINDS: dict[tuple, int] = {}


@dataclass(frozen=True)
class Shard:
    """Which part of a linear [n, k] this rank holds. ``n`` and ``k`` place it in the whole.

    ``parallel`` column or row; ``split``: other ranks hold the rest.
    """

    parallel: str
    n: Placement = _WHOLE
    k: Placement = _WHOLE
    split: bool = False


@dataclass(frozen=True)
class LinearCasts:
    """The six casts of one linear at one moment. ``w_redrawn``: dgrad's w changes every microbatch."""

    recipe: Recipe
    fprop_x: Cast
    fprop_w: Cast
    dgrad_dy: Cast
    dgrad_w: Cast
    wgrad_dy: Cast
    wgrad_x: Cast
    w_redrawn: bool

    @cached_property
    def w_shared(self) -> bool:
        """Whether dgrad's w is fprop's transposed: 2d tiles, rounded alike, without a rotation."""
        return self.fprop_w.spec.tiled and self._w_alike

    @cached_property
    def w_scaled_once(self) -> bool:
        """The same of one scale for the whole tensor, measured now."""
        spec = self.fprop_w.spec
        return spec.block == "tensor" and spec.amax == "current" and self._w_alike

    @property
    def _w_alike(self) -> bool:
        fprop, dgrad = self.fprop_w, self.dgrad_w
        same = fprop.spec == dgrad.spec and not fprop.spec.stochastic
        turned = fprop.rotation_size or dgrad.rotation_size
        return same and not turned and fprop.multiple == dgrad.multiple

    def first(self, gemm: str) -> Cast:
        """The cast of a GEMM's first operand."""
        cast: Cast = getattr(self, f"{gemm}_{OPERANDS[gemm][0]}")
        return cast

    def all(self) -> dict[str, Cast]:
        """The casts by "gemm.operand"."""
        return {
            f"{gemm}.{operand}": getattr(self, f"{gemm}_{operand}")
            for gemm, operand, _ in self.recipe.operands()
        }


@dataclass(frozen=True)
class _Prepared:
    """A linear's casts, cached for a recipe object, and which of them every moment draws anew.

    The casts hold their recipe, whose identity is the key they are found by, so it stays alive.
    """

    casts: LinearCasts
    drawn: tuple[tuple[Site, str, bool, bool], ...]  # site, attribute, has it noise, new signs


_PREPARED: dict[tuple, _Prepared] = {}
_MOST_PREPARED = 1 << 14


def linear_casts(
    recipe: Recipe,
    moment: Moment,
    shard: Shard,
    *,
    layer: int = 0,
    linear: int = 0,
    global_amax: bool = True,
) -> LinearCasts:
    """The casts of ``recipe`` for the shard of one linear, with the noise and signs of the moment.

    Called before every forward of every linear, and most of it is the same each time: only noise,
    and signs that are redrawn, are made anew. Recipes are found by identity: pass interned ones.

    Args:
        layer: the linear's layer, counted over the whole model, as in ``Site``.
        linear: which linear of that layer, as in ``Site``.
        global_amax: scale shards by the largest magnitude of the whole tensor.
    """
    place = layer, linear
    prepared, first = _prepared(recipe, moment, shard, place, global_amax=global_amax)
    if not prepared.drawn or (first and moment.draws is None):
        return prepared.casts
    casts = object.__new__(LinearCasts)
    casts.__dict__.update(prepared.casts.__dict__)
    for site, attribute, stochastic, resampled in prepared.drawn:
        cast: Cast = casts.__dict__[attribute]
        noise, signs = None, cast.signs
        if stochastic:
            row, col = _place(site, shard)
            noise = moment.noise(site, row=row, col=col)
        rotation = recipe.gemm(site.gemm).rotation
        if resampled:
            signs = moment.signs(site, rotation)
        draw = None
        if moment.draws is not None:
            draw = moment.draws.row(moment, site, rotation if signs is not None else None)
        casts.__dict__[attribute] = cast.drawn(noise, signs, draw)
    return casts


def lasting_casts(
    recipe: Recipe,
    moment: Moment,
    shard: Shard,
    *,
    layer: int = 0,
    linear: int = 0,
    global_amax: bool = True,
) -> tuple[LinearCasts, frozenset[str]]:
    """The casts of ``linear_casts`` without noise and redrawn signs, and the names ("wgrad_x") of the
    casts that redraw signs.

    Nothing is drawn: what the casts ask of a tensor before anybody casts it.
    """
    place = layer, linear
    prepared, _ = _prepared(recipe, moment, shard, place, global_amax=global_amax)
    redrawn = frozenset(name for _, name, _, resampled in prepared.drawn if resampled)
    return prepared.casts, redrawn


def _prepared(
    recipe: Recipe, moment: Moment, shard: Shard, place: tuple[int, int], *, global_amax: bool
) -> tuple[_Prepared, bool]:
    """A linear's prepared casts; and whether they were made just now, so that they have this moment's
    draws already."""
    key = id(recipe), moment.seed, *place, shard, global_amax
    prepared = _PREPARED.get(key)
    if prepared is not None:
        return prepared, False
    prepared = _prepare(recipe, moment, shard, place, global_amax=global_amax)
    if len(_PREPARED) >= _MOST_PREPARED:
        _PREPARED.clear()
    _PREPARED[key] = prepared
    return prepared, True


def _prepare(
    recipe: Recipe, moment: Moment, shard: Shard, place: tuple[int, int], *, global_amax: bool
) -> _Prepared:
    made: dict[str, Cast] = {}
    drawn = []
    # what of x waits for the backward pass
    saved = ("fprop" if recipe.wgrad.x.source == "forward" else "wgrad"), "x"
    for gemm, operand, spec in recipe.operands():
        site = Site(*place, gemm, operand)
        chosen, rotation = recipe.gemm(gemm), recipe.gemm(gemm).rotation
        row, col = _place(site, shard)
        resampled = rotation.resample in ("step", "gemm") and rotation.kind == "random_hadamard"
        made[f"{gemm}_{operand}"] = Cast(
            spec=spec,
            site=site,
            transpose=(gemm, operand) in _TRANSPOSED,
            multiple=chosen.contraction_multiple,
            rotation_size=rotation.size if rotation.active else 0,
            rotated_fp32=rotation.active and rotation.dtype == "fp32",
            signs=moment.signs(site, rotation),
            noise=moment.noise(site, row=row, col=col) if spec.stochastic else None,
            shared=global_amax and shard.split and _is_shared(spec, site, shard),
            saved=(gemm, operand) == saved,
        )
        if spec.stochastic or resampled:
            drawn.append((site, f"{gemm}_{operand}", spec.stochastic, resampled))
    redrawn = recipe.dgrad.rotation.active and recipe.dgrad.rotation.resample == "gemm"
    return _Prepared(LinearCasts(recipe, **made, w_redrawn=redrawn), tuple(drawn))


_TRANSPOSED = (("dgrad", "w"), ("wgrad", "dy"), ("wgrad", "x"))
# Rows and columns of the six operands: tokens, output features, input features.
_AXES = {
    ("fprop", "x"): "tk",
    ("fprop", "w"): "nk",
    ("dgrad", "dy"): "tn",
    ("dgrad", "w"): "kn",
    ("wgrad", "dy"): "nt",
    ("wgrad", "x"): "kt",
}
_SPLIT_AXIS = {"column": "n", "row": "k"}


def _is_shared(spec: QuantSpec, site: Site, shard: Shard) -> bool:
    """Whether the operand's scale depends on elements that another rank holds."""
    axes, split = _AXES[site.gemm, site.operand], _SPLIT_AXIS[shard.parallel]
    if spec.amax_span == "tensor":
        return split in axes
    return spec.amax_span == "row" and axes[1] == split


def _place(site: Site, shard: Shard) -> tuple[Placement, Placement]:
    """(row, column) placement of an operand's shard, in the operand's own orientation."""
    placed = {"t": _WHOLE, "n": shard.n, "k": shard.k}
    axes = _AXES[site.gemm, site.operand]
    return placed[axes[0]], placed[axes[1]]
