"""Where a run's rows go, and what dashboards are told of it beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fp4pretrain.observe import (
    About,
    CompositeSink,
    ConsoleSink,
    JsonlSink,
    Sink,
    Table,
    WandbSink,
    stored_run_id,
)
from fp4pretrain.observe.tensorboard_sink import FOLDER, TensorBoardSink
from fp4pretrain.precision import GEMMS, Plan, Recipe
from fp4pretrain.report.live import LiveGap
from fp4pretrain.train.changes import Changes, told
from fp4pretrain.train.run_dir import METRICS
from fp4pretrain.train.trainer import Trainer

_FILES = ("plan.txt", "audit.json")


@dataclass(frozen=True)
class Told:
    """``gap``: the run's baseline, if it has one. ``changes``: against the checkpoint. ``goes_on``:
    whether rows that the folder has already belong to this run."""

    gap: LiveGap | None
    changes: Changes
    goes_on: bool


def sinks_of(trainer: Trainer, path: Path, known: Told) -> Sink:
    """The sinks that the run's config names, as one."""
    config, w = trainer.config, trainer.config.logging.wandb
    resume_step = trainer.step if known.goes_on else None
    sinks: list[Sink] = [JsonlSink(path / METRICS, resume_step=resume_step)]
    if config.logging.console != "quiet":
        console = Console(
            highlight=False,
            force_terminal={"progress": True, "lines": False}.get(config.logging.console),
        )
        sinks.append(
            ConsoleSink(total_steps=config.train.steps, start_step=trainer.step, console=console)
        )
    about = about_run(trainer, known)
    if w.mode != "disabled":
        resume_id = stored_run_id(path) if known.goes_on else None
        said = {**asdict(config), **_identity(trainer, known.changes)}
        sinks.append(WandbSink(said, path, w, about, resume_id))
    if config.logging.tensorboard:
        resume_tokens = trainer.tokens if known.goes_on else None
        sinks.append(TensorBoardSink(path / FOLDER, about, resume_tokens))
    return CompositeSink(sinks)


def about_run(trainer: Trainer, known: Told) -> About:
    """Tags and the table of the recipe; and what differs from the baseline, where there is one."""
    plan = trainer.binding.plan
    tables = {"recipe": Table(Recipe.HEADER, plan.recipe.rows())}
    if known.gap is not None:
        differing = known.gap.differences(asdict(trainer.config))
        tables["config_diff"] = Table(("key", "baseline", "run"), differing)
    return About(tags(plan), tables, _FILES, changed=bool(known.changes))


def tags(plan: Plan) -> list[str]:
    """Short words for what a plan does: formats, rotations, roundings other than to nearest, and whether
    it changes on the way. ``bf16`` where it quantizes nothing."""
    recipes = [recipe for recipe in plan.recipes() if recipe.quantized]
    specs = [spec for recipe in recipes for _, _, spec in recipe.operands() if spec.quantized]
    turned = [recipe.gemm(gemm).rotation for recipe in recipes for gemm in GEMMS]
    found = [
        *sorted({spec.format for spec in specs}),
        *sorted({_rotation(one.kind, one.size) for one in turned if one.active}),
        *sorted({spec.rounding for spec in specs} - {"nearest"}),
        *(["switches"] if any(rule.timed for rule in plan.ordered) else []),
    ]
    return found or ["bf16"]


def _rotation(kind: str, size: int) -> str:
    return f"{'RHT' if kind == 'random_hadamard' else 'H'}{size}"


def _identity(trainer: Trainer, found: Changes) -> dict[str, Any]:
    """What wandb's config gets beside the run config: the experiment's digest, and what was changed on
    resume."""
    whole = trainer.fingerprint
    identity = {
        "fingerprint": whole["digest"],
        "plan": whole["plan"],
        "fingerprint_data": whole["data"],
    }
    if found:
        identity["changes"] = {f"step_{trainer.step + 1}": told(found)}
    return identity
