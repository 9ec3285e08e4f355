"""Where randomness comes from: keys, not states.

Stochastic rounding and random rotation signs are functions of
(seed, step, microbatch, global layer, linear, GEMM, operand) and of the element's global
coordinates. So activation recompute, a resumed run and any other layout draw the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fp4pretrain.numerics import Noise, derive_key, random_signs, signs_te
from fp4pretrain.precision import GEMMS, OPERANDS, Rotation

# Where a shard sits along one axis: offset, and (0, 0) or part length and gap (see numerics.Noise).
Placement = tuple[int, int, int]

_NOISE, _SIGNS = 1, 2
_GEMM_INDEX = {name: i for i, name in enumerate(GEMMS)}
# Weights are cast once a step, whichever microbatch comes first.
_NO_MICROBATCH = -1


@lru_cache(maxsize=4096)
def _signs(key: int, size: int) -> tuple[int, ...]:
    return random_signs(key, size)


@dataclass(frozen=True)
class NoiseKeys:
    """The keys of one linear at one moment. ``microbatch`` counts over all data-parallel ranks."""

    seed: int
    step: int
    microbatch: int
    layer: int
    linear: int

    def noise(
        self,
        gemm: str,
        operand: str,
        *,
        row: Placement = (0, 0, 0),
        col: Placement = (0, 0, 0),
    ) -> Noise:
        """The noise of one operand; ``row`` and ``col`` place its shard in the whole operand."""
        microbatch = _NO_MICROBATCH if operand == "w" else self.microbatch
        index = _GEMM_INDEX[gemm], OPERANDS[gemm].index(operand)
        key = derive_key(self.seed, _NOISE, self.step, microbatch, self.layer, self.linear, *index)
        return Noise(key, row[0], col[0], row[1], row[2], col[1], col[2])

    def signs(self, gemm: str, rotation: Rotation) -> tuple[int, ...] | None:
        """The sign vector of a GEMM's rotation (+-1, ``rotation.size`` long); None without signs."""
        if rotation.kind != "random_hadamard":
            return None
        if rotation.signs == "te":
            return tuple(int(s) for s in signs_te())
        moment = {
            "never": (),
            "layer": (self.layer, self.linear),
            "step": (self.step,),
            "gemm": (self.step, self.microbatch, self.layer, self.linear, _GEMM_INDEX[gemm]),
        }[rotation.resample]
        return _signs(derive_key(self.seed, _SIGNS, *moment), rotation.size)
