"""Parts of a plan: sets of casts that are quantized while every other cast is BF16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.precision import BF16, GEMMS, OPERANDS, Plan, Recipe
from fp4pretrain.precision.rules import short_name

KINDS = ("gemm", "operand", "linear", "layer", "cell")


@dataclass(frozen=True)
class CastAt:
    """One quantized operand: global layer (None: the head), linear by its global name, GEMM, operand."""

    layer: int | None
    linear: str
    gemm: str
    operand: str

    def part(self, kind: str) -> str:
        """The name of the part of this kind that the cast belongs to."""
        layer = "head" if self.layer is None else f"layer {self.layer}"
        return {
            "gemm": self.gemm,
            "operand": f"{self.gemm} {self.operand}",
            "linear": short_name(self.linear),
            "layer": layer,
            "cell": f"{layer} {self.gemm}",
        }[kind]


def quantized_casts(plan: Plan) -> list[CastAt]:
    """All casts of the plan below BF16, timed rules (a late switch) left out."""
    return [
        CastAt(layer, linear, gemm, operand)
        for layer, linear in plan.linears()
        for gemm, operand, spec in untimed(plan, layer, linear).operands()
        if spec.quantized
    ]


def untimed(plan: Plan, layer: int | None, linear: str) -> Recipe:
    """The recipe of a linear where no timed rule holds."""
    return plan.recipes_of(layer, linear)[0]


def parts_of(casts: Iterable[CastAt], kind: str) -> dict[str, list[CastAt]]:
    """Name -> casts of every part of a kind, in the model's order."""
    found: dict[str, list[CastAt]] = {}
    for cast in casts:
        found.setdefault(cast.part(kind), []).append(cast)
    return found


def only(recipe: Recipe, kept: Callable[[str, str], bool]) -> Recipe:
    """The recipe with every operand in BF16 for which ``kept(gemm, operand)`` is false. A GEMM keeps
    its rotation as long as one of its operands is quantized."""
    gemms = {}
    for gemm in GEMMS:
        chosen = recipe.gemm(gemm)
        quantized = [o for o in OPERANDS[gemm] if recipe.operand(gemm, o).quantized]
        stay = [operand for operand in quantized if kept(gemm, operand)]
        if not stay:
            gemms[gemm] = BF16.gemm(gemm)
            continue
        plain = {operand: QuantSpec() for operand in OPERANDS[gemm] if operand not in stay}
        gemms[gemm] = replace(chosen, **plain)  # type: ignore[arg-type]
    return Recipe(**gemms).interned()  # type: ignore[arg-type]


def rules_text(cells: Sequence[str], *, remark: str) -> str:
    """YAML of the rules that keep the named cells (``layer 2 wgrad``) in BF16: one for each GEMM and
    run of neighbouring layers, to stand in a recipe file after what it has."""
    lines = [f"# {remark}", "precision:", "  rules:"]
    for gemm in GEMMS:
        names = [cell.rpartition(" ")[0] for cell in cells if cell.rpartition(" ")[2] == gemm]
        layers = sorted(int(name.split()[1]) for name in names if name != "head")
        for first, last in _ranges(layers):
            lines.append(
                f"    keep_{gemm}_{first}: {{recipe: bf16, gemms: [{gemm}], "
                f"blocks: '{first}:{last + 1}'}}"
            )
        if "head" in names:
            lines.append(
                f"    keep_{gemm}_head: {{recipe: bf16, gemms: [{gemm}], linears: [head]}}"
            )
    return "\n".join(lines) + "\n"


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of runs without a gap."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
