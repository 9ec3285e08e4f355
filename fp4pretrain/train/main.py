"""Training a checked config, and a recipe beside its baseline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fp4pretrain.config import RunConfig
from fp4pretrain.data import unigram_entropy, validate
from fp4pretrain.model.layout import check_layout
from fp4pretrain.observe import (
    CompositeSink,
    ConsoleSink,
    JsonlSink,
    Sink,
    WandbSink,
    stored_run_id,
)
from fp4pretrain.parallel.groups import join, leave, pick_device, world_size
from fp4pretrain.train import checkpoint
from fp4pretrain.train.hooks import (
    Checkpointing,
    Evaluation,
    Guard,
    Logging,
    Profiling,
    Signals,
    Watchdog,
)
from fp4pretrain.train.loop import fit
from fp4pretrain.train.run_dir import CHECKPOINTS, check_free, on_main, prepare, run_path
from fp4pretrain.train.trainer import Trainer, build_trainer, data_spec, samples_needed


def check_run(config: RunConfig) -> None:
    """Everything that can be refused before any rank starts to work. Raises UserError."""
    check_layout(config, world_size())
    pick_device(config.parallel.device)
    validate(data_spec(config), samples=samples_needed(config))


def train(config: RunConfig) -> Path:
    """Train one run from start or checkpoint to end; returns its folder. Leaves no groups behind.

    Raises SystemExit(0) where a signal stopped it after a save, and UserError.
    """
    layout = check_layout(config, world_size())
    path = run_path(config)
    device = pick_device(config.parallel.device)
    world = join(
        device=device,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        virtual_pipeline=config.parallel.virtual_pipeline,
        seed=config.seed,
        timeout_minutes=config.parallel.timeout_minutes,
    )
    try:
        on_main(lambda: check_free(path, config.resume), is_main=world.is_main)
        trainer = build_trainer(config, world, layout)
        start = checkpoint.resume(
            trainer, path / CHECKPOINTS, config.resume, say=_warn if world.is_main else _silent
        )
        plan_text = f"{trainer.backend_choice}\n\n{trainer.binding.plan}"
        on_main(
            lambda: prepare(
                path,
                config,
                plan_text=plan_text,
                unigram_entropy=unigram_entropy(trainer.valid_data),
            ),
            is_main=world.is_main,
        )
        if world.is_main:
            _announce(trainer, path, start)
        logging = Logging(trainer, _sinks(trainer, path) if world.is_main else None)
        if start is not None and world.is_main:
            _log_recipe_change(trainer, start, logging)
        checkpointing = Checkpointing(path / CHECKPOINTS, logging)
        hooks = [
            Watchdog(path / "stacks", logging, config.guard),
            Guard(path, logging, checkpointing),
            logging,
            Profiling(path / "profile", logging),
            Evaluation(logging),
            checkpointing,
            Signals(checkpointing),
        ]
        fit(trainer, hooks)
        if trainer.stopped:
            raise SystemExit(0)  # asked to stop by a signal: no further run of a sweep either
    finally:
        leave()
    return path


def _announce(trainer: Trainer, path: Path, start: Path | None) -> None:
    config, world = trainer.config, trainer.world
    if config.logging.console == "quiet":
        return
    console = Console(highlight=False, soft_wrap=True)
    console.rule(f"[bold]{config.precision.name}[/bold]  {path}")
    console.print(
        f"{trainer.parameters / 1e6:.1f}M parameters, {config.train.steps} steps of "
        f"{config.train.global_batch} x {config.model.seq_length} tokens on {world.size} "
        f"{world.device.type} rank(s): TP {config.parallel.tensor}, PP {config.parallel.pipeline}, "
        f"DP {trainer.layout.data}; {trainer.backend_choice}"
    )
    if start is not None:
        console.print(f"continuing from {start} (step {trainer.step})")
    console.print(str(trainer.binding.plan))
    for warning in trainer.binding.plan.recipe.warnings():
        console.print(f"[yellow]warning[/yellow] {warning}")


def _log_recipe_change(trainer: Trainer, start: Path, logging: Logging) -> None:
    """A run that goes on in another recipe says so on the console and in its metrics, at the first
    step of the new one: a row that is cut and written again if the run is resumed once more."""
    found = checkpoint.described(start)
    change = checkpoint.recipe_change(found, trainer.config)
    if change is None:
        return
    key, was, now = change
    names = {
        "recipe": trainer.config.precision.name,
        "recipe_before": found["precision"].get("name"),
    }
    step = trainer.step + 1
    _warn(
        f"from step {step} on the recipe is {names['recipe']}, before {names['recipe_before']} "
        f"({key}: {was} -> {now})"
    )
    logging.write({"event": "recipe", "step": step, "tokens": trainer.tokens, **names})


def _warn(text: str) -> None:
    print(f"warning: {text}", flush=True)


def _silent(text: str) -> None:
    """What a rank that is not the main one says."""


def _sinks(trainer: Trainer, path: Path) -> Sink:
    config = trainer.config
    resumed = trainer.step if config.resume is not None else None
    sinks: list[Sink] = [JsonlSink(path / "metrics.jsonl", resume_step=resumed)]
    if config.logging.console != "quiet":
        console = Console(
            highlight=False,
            force_terminal={"progress": True, "lines": False}.get(config.logging.console),
        )
        sinks.append(
            ConsoleSink(total_steps=config.train.steps, start_step=trainer.step, console=console)
        )
    w = config.logging.wandb
    if w.mode != "disabled":
        sinks.append(
            WandbSink(
                asdict(config),
                path,
                mode=w.mode,
                project=w.project,
                entity=w.entity,
                group=w.group,
                tags=w.tags,
                name=w.name,
                resume_id=stored_run_id(path) if config.resume is not None else None,
            )
        )
    return CompositeSink(sinks)
