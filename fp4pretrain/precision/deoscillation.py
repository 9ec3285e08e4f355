"""When weights that swing around a rounding boundary are set onto what they round to.

A weight near the boundary between two codes moves little, while its cast jumps by a whole code, to and
fro. OsciReset of TetraJet-v2 (arXiv:2510.27527) sums the distances that the weight and its cast move in
each step of a window. Where the cast moved ``ratio`` times as far as the weight, the weight is set onto
its cast. AMD's port calls this weight de-oscillation; its windows reach from one reset to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.precision.recipe import Recipe
from fp4pretrain.precision.when import Progress, parse_point

_KEY = "precision.deoscillation"


@dataclass(frozen=True)
class Deoscillation:
    """Resets every ``period`` steps, by the distances moved in the last ``window`` of them.

    Attributes:
        period: steps from reset to reset, counted from the run's first step; 0 for none.
        window: steps before a reset over which distances are summed; 0: all since the last reset.
        ratio: a weight is reset where its cast moved at least this times as far as it did.
        start: no window opens before this moment: a fraction of the run, '500 steps' or '2B tokens'.

    Raises:
        UserError: naming the key, for numbers that cannot be meant.
    """

    period: int = 0
    window: int = 0
    ratio: float = 4.0
    start: Any = None

    def __post_init__(self) -> None:
        if self.period < 0:
            raise UserError(
                f"{_KEY}.period: {self.period} is negative; give steps, or 0 for no resets"
            )
        if not 0 <= self.window <= self.period:
            raise UserError(
                f"{_KEY}.window: {self.window} is not within a period of {self.period} steps; give "
                "fewer, or 0 for the whole period"
            )
        if not self.ratio > 0:
            raise UserError(f"{_KEY}.ratio: {self.ratio} is not above 0; the papers use 3 to 16")
        parse_point(f"{_KEY}.start", self.start)

    def __bool__(self) -> bool:
        return self.period > 0

    def opens(self, progress: Progress) -> bool:
        """Whether a window begins with the next step."""
        if not self or (progress.step + (self.window or self.period)) % self.period:
            return False
        start = parse_point(f"{_KEY}.start", self.start)
        return start is None or start.reached(progress)

    def closes(self, step: int) -> bool:
        """Whether finished step ``step`` is the last of a window, if one is open."""
        return bool(self) and step > 0 and step % self.period == 0

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose weights have no cast of their own to be set onto.

        Raises:
            UserError: naming the key and the cure.
        """
        if not self:
            return
        problem = unsettled(recipe.fprop.w, rotated=recipe.fprop.rotation.active)
        if problem:
            raise UserError(
                f"precision.{problem}, so none has a cast to be set onto; change that, or set "
                f"{_KEY}.period=0"
            )

    def __str__(self) -> str:
        window = f"{self.window} of " if self.window else ""
        start = parse_point(f"{_KEY}.start", self.start)
        return (
            f"every {self.period} steps weights whose cast went {self.ratio:g} times as far as they "
            f"did, over {window}these steps, are set onto their cast"
            + (f", from {start} on" if start else "")
        )


def unsettled(spec: QuantSpec, *, rotated: bool) -> str | None:
    """Why a weight that fprop casts by ``spec`` has no cast to be set onto, as a key of fprop and a
    clause; None where it has one."""
    if not spec.quantized:
        return "fprop.w.format: weights are not quantized in the forward pass"
    if spec.rounding != "nearest":
        return f"fprop.w.rounding: {spec.rounding} rounds a weight otherwise in each step"
    if rotated:
        return "fprop.rotation.kind: weights are rotated before they are cast"
    if spec.split != "none":
        return "fprop.w.split: a weight is cast as a sum of terms"
    if spec.amax not in ("current", "fixed"):
        return f"fprop.w.amax: with {spec.amax} amaxes a weight's cast depends on earlier steps"
    return None
