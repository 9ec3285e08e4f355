"""The ranking of parts by what they do alone, and rules that keep the worst in BF16."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fp4pretrain.config import RunConfig, compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import leave, world_size
from fp4pretrain.precision import Plan, Recipe
from fp4pretrain.report.student import Interval, interval
from fp4pretrain.stored import read_config
from fp4pretrain.train import checkpoint
from fp4pretrain.train.culprit.measure import Effect, Lab
from fp4pretrain.train.culprit.parts import (
    KINDS,
    CastAt,
    only,
    parts_of,
    quantized_casts,
    rules_text,
    untimed,
)
from fp4pretrain.train.run_dir import CHECKPOINTS
from fp4pretrain.train.trainer import Trainer, build_trainer, join_run

ALL = "everything"
MEASURES = ("gradient", "loss")


@dataclass(frozen=True)
class Ranked:
    """One part quantized alone. ``loss``: relative change of the loss; ``gradient``: relative error of
    the weight gradients; means over batches, with the 90% interval where there are two or more."""

    kind: str
    part: str
    loss: float
    gradient: float
    loss_interval: Interval | None
    gradient_interval: Interval | None

    def by(self, measure: str) -> float:
        """The number to rank by: of the loss only a rise counts as harm."""
        return self.gradient if measure == "gradient" else self.loss


@dataclass(frozen=True)
class Fix:
    """Cells kept in BF16, what is left of the whole plan's effect then, and the rules as YAML."""

    cells: tuple[str, ...]
    target: float
    before: Ranked
    after: Ranked
    rules: str


@dataclass(frozen=True)
class Culprit:
    """``whole``: the recipe as it is. ``ranked``: by kind, the worst first."""

    step: int
    batches: int
    measure: str
    whole: Ranked
    ranked: dict[str, list[Ranked]]
    fix: Fix | None


def find_culprit(
    run: Path,
    *,
    precision: str | None = None,
    kinds: Sequence[str] = KINDS[:-1],
    batches: int = 4,
    measure: str = "gradient",
    target: float | None = None,
) -> Culprit:
    """Rank the parts of a run's recipe from its newest checkpoint; every rank calls it.

    Args:
        precision: another recipe, for the weights of the run.
        kinds: of ``parts.KINDS``.
        target: what the plan's effect (``measure``) may be at most; asks for a ``Fix``.

    Raises:
        UserError: for a folder without config or checkpoint, a recipe that quantizes nothing, and linears
            that are not ours.
    """
    config = _config(run, precision)
    if config.model.implementation != "fp4pretrain":
        raise UserError(
            f"{run}: its linears are those of {config.model.implementation}, which shows no casts; give one "
            "trained with model.implementation=fp4pretrain"
        )
    layout = check_layout(config, world_size())
    world = join_run(config)
    try:
        trainer = build_trainer(config, world, layout)
        if checkpoint.resume(trainer, run / CHECKPOINTS, "auto", say=print) is None:
            raise UserError(
                f"{run}: it has no checkpoint; the culprit is sought in trained weights"
            )
        return _Search(trainer, batches, measure).found(kinds, target)
    finally:
        leave()


def _config(run: Path, precision: str | None) -> RunConfig:
    config = read_config(run)
    if precision is not None:
        config = replace(config, precision=compose([f"precision={precision}"]).precision)
    if not quantized_casts(plan_of(config)):
        raise UserError(
            f"{run}: its recipe {config.precision.name} quantizes nothing; name one to try on its "
            "weights with --precision"
        )
    parallel = replace(config.parallel, distributed_optimizer=False, device="auto")
    if world_size() == 1:
        parallel = replace(
            parallel, tensor=1, pipeline=1, virtual_pipeline=None, sequence=False, context=1
        )
    return replace(
        config,
        parallel=parallel,
        resume="auto",
        resume_with=[*config.resume_with, "precision"],
        baseline=None,
    )


class _Search:
    def __init__(self, trainer: Trainer, batches: int, measure: str) -> None:
        self._trainer, self._measure = trainer, measure
        self._plan: Plan = trainer.binding.plan
        self._casts = quantized_casts(self._plan)
        self._lab = Lab(trainer, batches=batches)

    def found(self, kinds: Sequence[str], target: float | None) -> Culprit:
        """All parts of all kinds in one pass over the batches."""
        wanted = [*kinds, *(["cell"] if target is not None and "cell" not in kinds else [])]
        parts = [
            (kind, part, casts)
            for kind in wanted
            for part, casts in parts_of(self._casts, kind).items()
        ]
        parts.append((ALL, ALL, self._casts))
        ranked = self._ranked(parts)
        whole = ranked.pop()
        by_kind = {
            kind: sorted(
                (one for one in ranked if one.kind == kind),
                key=lambda one: one.by(self._measure),
                reverse=True,
            )
            for kind in wanted
        }
        fix = None if target is None else self._fix(by_kind["cell"], whole, target)
        shown = {kind: by_kind[kind] for kind in kinds}
        return Culprit(
            self._trainer.step, self._lab.batches, self._measure, whole, shown, fix
        )  # fmt: skip

    def _fix(self, cells: Sequence[Ranked], whole: Ranked, target: float) -> Fix:
        """The fewest of the worst cells in BF16 with which the rest meets the target, by bisection."""
        low, high = 0, len(cells)  # `high` cells are enough: then nothing is quantized
        after = {0: whole}
        if whole.by(self._measure) <= target:
            high = 0
        while low < high:
            middle = (low + high) // 2
            after.setdefault(middle, self._without({one.part for one in cells[:middle]}))
            if after[middle].by(self._measure) <= target:
                high = middle
            else:
                low = middle + 1
        kept = tuple(one.part for one in cells[:high])
        last = after[high] if high in after else self._without(set(kept))
        remark = (
            f"{self._measure}: {whole.by(self._measure):.4g} as it is, {last.by(self._measure):.4g} "
            f"with these rules, target {target:.4g}"
        )
        return Fix(kept, target, whole, last, rules_text(kept, remark=remark))

    def _without(self, cells: Collection[str]) -> Ranked:
        casts = [cast for cast in self._casts if cast.part("cell") not in cells]
        return self._ranked([(ALL, ALL, casts)])[0]

    def _ranked(self, parts: Sequence[tuple[str, str, Sequence[CastAt]]]) -> list[Ranked]:
        effects = self._lab.effects([self._recipes(casts) for _, _, casts in parts])
        return [
            _ranked(kind, part, found)
            for (kind, part, _), found in zip(parts, effects, strict=True)
        ]

    def _recipes(self, casts: Sequence[CastAt]) -> list[Recipe]:
        kept = set(casts)

        def recipe(layer: int | None, linear: str) -> Recipe:
            whole = untimed(self._plan, layer, linear)
            return only(whole, lambda g, o: CastAt(layer, linear, g, o) in kept)

        return [recipe(layer, linear) for layer, linear, _ in self._trainer.binding.linears]


def _ranked(kind: str, part: str, effects: Sequence[Effect]) -> Ranked:
    losses = [one.loss if math.isfinite(one.loss) else math.inf for one in effects]
    gradients = [one.gradient for one in effects]
    return Ranked(
        kind,
        part,
        statistics.fmean(losses),
        statistics.fmean(gradients),
        interval(losses),
        interval(gradients),
    )
