"""Where randomness comes from: keys, not states.

Stochastic rounding and random rotation signs are functions of (seed, step, microbatch) and of the site
(global layer, linear, GEMM, operand), and of the element's global coordinates. So activation recompute,
a resumed run and any other layout draw the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from fp4pretrain.numerics import Noise, derive_key, random_signs, signs_te
from fp4pretrain.precision import GEMMS, OPERANDS, Rotation
from fp4pretrain.precision.rules import HEAD, LINEARS, QKV_PARTS, short_name

if TYPE_CHECKING:
    from fp4pretrain.ops.draws import Draws

# Where a shard sits along one axis: offset, and (0, 0) or part length and gap (see numerics.Noise).
Placement = tuple[int, int, int]

NOISE_STREAM, SIGNS_STREAM = 1, 2
_GEMM_INDEX = {name: i for i, name in enumerate(GEMMS)}
# Weights are cast once a step, whichever microbatch comes first.
_NO_MICROBATCH = -1
# What ``Site.linear`` counts: parts of a divided linear come after the head.
_PLACES = (*LINEARS, HEAD, *QKV_PARTS)


@dataclass(frozen=True)
class Site:
    """The name of one cast: which operand of which GEMM of which linear.

    ``layer`` counts globally from 0 (-1: the head), ``linear`` is its place among the linears of a
    block (the head's and those of parts of attention's projections come after them).
    """

    layer: int
    linear: int
    gemm: str
    operand: str

    @cached_property
    def path(self) -> tuple[int, int, int, int]:
        """The integers that stand for the site in noise keys."""
        index = OPERANDS[self.gemm].index(self.operand)
        return self.layer, self.linear, _GEMM_INDEX[self.gemm], index

    @property
    def short(self) -> str:
        """The short name of the linear: ``fc2``, ``head``, ``qk``."""
        return short_name(_PLACES[self.linear])


def site_of(layer: int | None, linear: str, gemm: str, operand: str) -> Site:
    """The site of an operand of a linear by its global name; ``layer`` None: the head."""
    return Site(*place_of(layer, linear), gemm, operand)


def place_of(layer: int | None, linear: str) -> tuple[int, int]:
    """(layer, linear) as in ``Site`` of a linear by its global name; ``layer`` None: the head."""
    return -1 if layer is None else layer, _PLACES.index(linear)


@lru_cache(maxsize=4096)
def _signs(key: int, size: int) -> tuple[int, ...]:
    return random_signs(key, size)


@dataclass(frozen=True)
class Moment:
    """When a cast is made: the run's seed, the step, and the microbatch counted over all
    data-parallel ranks. ``draws``: where the keys of a captured step stand, see ``Draws``."""

    seed: int
    step: int
    microbatch: int
    draws: Draws | None = None

    def noise(self, site: Site, *, row: Placement = (0, 0, 0), col: Placement = (0, 0, 0)) -> Noise:
        """The noise of one operand; ``row`` and ``col`` place its shard in the whole operand."""
        key = derive_key(self.seed, NOISE_STREAM, self.step, microbatch_of(self, site), *site.path)
        return Noise(key, row[0], col[0], row[1], row[2], col[1], col[2])

    def signs(self, site: Site, rotation: Rotation) -> tuple[int, ...] | None:
        """The sign vector of the rotation of the site's GEMM (+-1, ``rotation.size`` long); None
        without signs. Both operands of a GEMM get the same."""
        if rotation.kind != "random_hadamard":
            return None
        if rotation.signs == "te":
            return tuple(int(s) for s in signs_te())
        path = sign_path(rotation, site, self.step, self.microbatch)
        return _signs(derive_key(self.seed, SIGNS_STREAM, *path), rotation.size)


def microbatch_of(moment: Moment, site: Site) -> int:
    """The microbatch in a site's noise key: weights are cast once a step."""
    return _NO_MICROBATCH if site.operand == "w" else moment.microbatch


def sign_path(rotation: Rotation, site: Site, step: int, microbatch: int) -> tuple[int, ...]:
    """The integers that name a draw of signs, by when the rotation draws them anew."""
    return {
        "never": (),
        "layer": (site.layer, site.linear),
        "step": (step,),
        "gemm": (step, microbatch, *site.path[:3]),
    }[rotation.resample]
