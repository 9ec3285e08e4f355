"""Training a checked config."""

from __future__ import annotations

import platform
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.data import unigram_entropy, validate
from fp4pretrain.model.build import fuses
from fp4pretrain.model.engine import ENGINE, check_engine
from fp4pretrain.model.layout import check_layout
from fp4pretrain.model.memory import check_fits, state_bytes
from fp4pretrain.observe import tensorboard_sink
from fp4pretrain.observe.sites import selection_of
from fp4pretrain.parallel.agreement import agree, attempted
from fp4pretrain.parallel.groups import leave, pick_device, world_size
from fp4pretrain.report.live import LiveGap
from fp4pretrain.train import checkpoint
from fp4pretrain.train.adam import adam_of
from fp4pretrain.train.changes import Changes, changes, told
from fp4pretrain.train.hooks import (
    Auditing,
    Checkpointing,
    Deoscillating,
    Evaluation,
    Guard,
    Logging,
    Observing,
    Profiling,
    Signals,
    Summarizing,
    Triggers,
    Watchdog,
)
from fp4pretrain.train.initial import check_initial, load_initial
from fp4pretrain.train.lock import RunLock
from fp4pretrain.train.loop import Hook, fit
from fp4pretrain.train.run_dir import (
    CHECKPOINTS,
    baseline_path,
    check_free,
    find_checkpoint,
    on_main,
    prepare,
    record_finished,
    record_start,
    run_path,
    starts_anew,
)
from fp4pretrain.train.sinks import Told, sinks_of
from fp4pretrain.train.trainer import Trainer, build_trainer, data_spec, join_run
from fp4pretrain.version import commit, sources_digest, versions


def check_run(config: RunConfig, *, elsewhere: int | None = None) -> None:
    """Everything that can be refused before any rank starts to work. Raises UserError.

    ``elsewhere``: the number of ranks of a run that other processes, or other machines, will train.
    """
    layout = check_layout(config, elsewhere or world_size())
    if elsewhere is None:
        device = pick_device(config.parallel.device)
        check_fits(state_bytes(config, layout), device)
        check_engine(config, plan_of(config), device)
    validate(data_spec(config))
    if config.init is not None and config.resume is None:  # else a checkpoint may come before it
        check_initial(config.init, config.model)
    if config.observe.interval:
        selection_of(config.observe).sites(plan_of(config))
    if config.logging.tensorboard:
        tensorboard_sink.check_installed()


class Stopped(SystemExit):
    """A run saved and left before its end. Uncaught, the process ends with status 0."""

    def __init__(self, *, by_signal: bool) -> None:
        super().__init__(0)
        self.by_signal = by_signal


def train(config: RunConfig, *, until: float | None = None) -> Path:
    """Train one run from start or checkpoint to end; returns its folder. Leaves no groups behind.

    Raises Stopped where a signal, or the time ``until`` (seconds since 1970), stopped it after a save,
    and UserError.
    """
    layout = check_layout(config, world_size())
    path = run_path(config)
    world = join_run(config)
    lock = RunLock(path)
    try:
        on_main(lambda: _take(path, config, lock), is_main=world.is_main)
        trainer = build_trainer(config, world, layout)
        start = checkpoint.resume(
            trainer, path / CHECKPOINTS, config.resume, say=_warn if world.is_main else _silent
        )
        if start is None and config.init is not None:
            _, problem = attempted(lambda: load_initial(trainer, str(config.init)))
            agree(problem)
        if start is not None and trainer.step >= config.train.steps:
            if world.is_main:
                _say_finished(trainer, path)
        else:
            _fit(trainer, path, start, until=until)
        on_main(lambda: record_finished(path, config.train.steps), is_main=world.is_main)
    finally:
        lock.release()
        leave()
    return path


def _take(path: Path, config: RunConfig, lock: RunLock) -> None:
    """The folder, for this process alone."""
    check_free(path, config.resume)
    lock.acquire()
    check_free(path, config.resume)  # another may have come and gone in between
    find_checkpoint(path, config)


def _fit(trainer: Trainer, path: Path, start: Path | None, *, until: float | None) -> None:
    """Train the steps that are left, with their hooks. Raises Stopped."""
    config, world = trainer.config, trainer.world
    found = {} if start is None else _changes(trainer, start)
    devices = _devices(trainer)
    gap = _live_gap(trainer)
    fresh = starts_anew(path, config, start)
    on_main(
        lambda: _record(trainer, path, start, devices=devices, changes=told(found)),
        is_main=world.is_main,
    )
    if world.is_main:
        _announce(trainer, path, start)
        if fresh:
            print(
                f"no checkpoint in {path}: starting at step 1; the rows of the earlier attempt are "
                "kept beside the new ones",
                flush=True,
            )
    goes_on = config.resume is not None and not fresh
    sinks = sinks_of(trainer, path, Told(gap, found, goes_on=goes_on)) if world.is_main else None
    logging = Logging(trainer, sinks)
    if found and world.is_main:
        _log_changes(trainer, found, logging)
    checkpointing = Checkpointing(path / CHECKPOINTS, logging)
    signals = Signals(checkpointing, until=until)
    hooks: list[Hook] = [
        Watchdog(path / "stacks", logging, config.guard),
        Guard(path, logging, checkpointing),
        logging,
        Profiling(path / "profile", logging),
        Deoscillating(logging),
        *([Observing(trainer, logging)] if config.observe.interval else []),
        Evaluation(logging, gap),
        Summarizing(path, logging, gap),
        Triggers(logging),
        checkpointing,
        *([] if config.model.implementation == ENGINE else [Auditing(path / "audit.json")]),
        signals,
    ]
    fit(trainer, hooks)
    if trainer.stopped:
        raise Stopped(by_signal=signals.by_signal)


def _live_gap(trainer: Trainer) -> LiveGap | None:
    """On the main rank, where ``baseline`` is a run. Raises UserError on every rank."""
    baseline = baseline_path(trainer.config)
    if baseline is None:
        return None
    found: list[LiveGap] = []
    on_main(
        lambda: found.append(LiveGap(baseline, trainer.fingerprint)), is_main=trainer.world.is_main
    )
    return found[0] if found else None


def _record(
    trainer: Trainer, path: Path, start: Path | None, *, devices: dict[str, int], changes: str
) -> None:
    config = trainer.config
    prepare(
        path,
        config,
        plan_text=f"{trainer.backend_choice}\n\n{trainer.binding.plan}",
        unigram_entropy=unigram_entropy(next(iter(trainer.data.valid.values()))),
        fingerprint=trainer.fingerprint,
    )
    record_start(
        path,
        {
            "step": trainer.step,
            "resumed_from": None if start is None else str(start),
            "changes": changes,
            "fingerprint": trainer.fingerprint["digest"],
            "plan": trainer.fingerprint["plan"],
            "seeds": trainer.fingerprint["seeds"],
            "commit": commit(),
            "sources": sources_digest(),
            "versions": versions(),
            "optimizer": adam_of(trainer.optimizer),
            "devices": devices,
            "host": socket.gethostname(),
        },
    )


def _changes(trainer: Trainer, start: Path) -> Changes:
    return changes(
        start, checkpoint.described(start), trainer.config, data=trainer.fingerprint["data"]
    )


def _devices(trainer: Trainer) -> dict[str, int]:
    """The kinds of device that the ranks run on, and how many of each. Collective."""
    device = trainer.world.device
    cuda = device.type == "cuda"
    mine = torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})"
    found: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(found, mine)
    return dict(Counter(found))


def _say_finished(trainer: Trainer, path: Path) -> None:
    print(
        f"{path} is finished: step {trainer.step} of train.steps={trainer.config.train.steps}; "
        "nothing is left to train",
        flush=True,
    )


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
    console.print(f"{state_bytes(config, trainer.layout)}; {adam_of(trainer.optimizer)}")
    if world.device.type == "cuda":
        refused = trainer.replays.reason
        how = "captured as a CUDA graph" if refused is None else f"not captured ({refused})"
        kernels = "fused" if fuses(config) else "PyTorch's"
        console.print(f"steps: {how}; norms, activation, loss: {kernels} kernels")
    if start is not None:
        console.print(f"continuing from {start} (step {trainer.step})")
    console.print(str(trainer.binding.plan))
    for warning in trainer.binding.plan.warnings():
        console.print(f"[yellow]warning[/yellow] {warning}")


def _log_changes(trainer: Trainer, found: Changes, logging: Logging) -> None:
    """Say on the console and in the metrics that the run goes on as another experiment. The row has the
    first step of the new one, so that it is cut and written again if the run is resumed once more."""
    step = trainer.step + 1
    _warn(f"from step {step} on this is another experiment: {told(found)}")
    logging.write(
        {"event": "changed", "step": step, "tokens": trainer.tokens, "changes": told(found)}
    )


def _warn(text: str) -> None:
    print(f"warning: {text}", flush=True)


def _silent(text: str) -> None:
    """A rank that is not the main one prints nothing."""
