"""Which casts are observed: the sites of a plan that the ``observe`` section selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4pretrain.errors import UserError
from fp4pretrain.observe.statistics import STATISTICS
from fp4pretrain.ops.keys import Site, site_of
from fp4pretrain.precision import BF16, OPERANDS, Plan, Rule

_ALL_OPERANDS = ("x", "w", "dy")


@dataclass(frozen=True)
class Selection:
    """What to observe, in the words of ``precision.rules``: blocks, linears, GEMMs; and operands.

    Raises:
        UserError: naming the key, for an unknown word.
    """

    linears: Sequence[str]
    gemms: Sequence[str]
    operands: Sequence[str]
    statistics: Sequence[str]
    blocks: Any = None

    def __post_init__(self) -> None:
        for key, values, known in (
            ("operands", self.operands, _ALL_OPERANDS),
            ("statistics", self.statistics, STATISTICS),
        ):
            if not values:
                raise UserError(f"observe.{key}: it names none; use {', '.join(known)}")
            for value in values:
                if value not in known:
                    raise UserError(f"observe.{key}: {value!r} is unknown; use {', '.join(known)}")
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """The selection of linears and GEMMs as a rule, whose words and checks it shares."""
        try:
            return Rule(
                "observe",
                BF16,
                gemms=tuple(self.gemms),
                blocks=None if self.blocks is None else str(self.blocks),
                linears=tuple(self.linears),
            )
        except UserError as error:
            raise UserError(str(error).replace("precision.rules.observe", "observe")) from None

    def sites(self, plan: Plan) -> dict[str, Site]:
        """Label -> site of every selected operand that the plan ever casts below BF16, in the model's
        order: ``3.fc2.wgrad.dy``. For ``q`` that is the linear, or the part of it, that holds the
        queries. Raises UserError where there is none."""
        rule, found = self.rule, {}
        for layer, linear in plan.linears():
            if not rule.touches(layer, linear, plan.num_layers):
                continue
            recipes = plan.recipes_of(layer, linear)
            for gemm in rule.gemms:
                for operand in OPERANDS[gemm]:
                    quantized = any(r.operand(gemm, operand).quantized for r in recipes)
                    if operand in self.operands and quantized:
                        site = site_of(layer, linear, gemm, operand)
                        found[label(site)] = site
        if not found and plan.ever_quantized:
            raise UserError(
                "observe.blocks: nothing of what is selected is ever quantized; select other "
                "blocks, linears, gemms or operands, or set observe.interval=0"
            )
        return found


def selection_of(section: Any) -> Selection:
    """The selection of a run config's ``observe`` section."""
    return Selection(
        linears=section.linears,
        gemms=section.gemms,
        operands=section.operands,
        statistics=section.statistics,
        blocks=section.blocks,
    )


def label(site: Site) -> str:
    """``3.fc2.wgrad.dy``, ``3.qk.fprop.x``, ``head.fprop.x``."""
    where = site.short if site.layer < 0 else f"{site.layer}.{site.short}"
    return f"{where}.{site.gemm}.{site.operand}"


def scale_shares(observed: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Of a row's ``observed``: GEMM.operand -> octave of the scale -> share of blocks, summed over linears;
    zeros left out."""
    found: dict[str, dict[int, float]] = {}
    for site, shares in zip(observed.get("sites", ()), observed.get("scales", ()), strict=False):
        counts = found.setdefault(".".join(site.split(".")[-2:]), {})
        for octave, share in shares.items():
            if octave != "zero":
                counts[int(octave)] = counts.get(int(octave), 0.0) + share
    return {operand: counts for operand, counts in found.items() if counts}
