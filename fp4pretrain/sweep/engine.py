"""Trains what is left of a command's runs. A run that fails does not stop the others."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from fp4pretrain.errors import UserError, first_line
from fp4pretrain.parallel.agreement import Meeting
from fp4pretrain.parallel.groups import meet
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.sweep.planning import Command, Outcome, Planned, nobody, planned
from fp4pretrain.sweep.processes import Processes
from fp4pretrain.sweep.progress import Progress
from fp4pretrain.sweep.slurm import Slurm
from fp4pretrain.sweep.summary import report, sentence
from fp4pretrain.train.main import Stopped, train
from fp4pretrain.units import seconds_of


def train_all(
    sweep: list[list[str]],
    *,
    stored: Path | None = None,
    until: float | None = None,
    compared: bool = True,
) -> list[Outcome]:
    """Compose and judge every run of a sweep, then train what is left, here in order or by the launcher
    that ``sweep.launcher`` names; what became of each.

    Runs that are finished already are passed over, and broken ones go on from their checkpoints: the same
    command again does what is left. At the end comes one table, and the picture and page of the loss
    gaps. A run that fails is a line and an outcome; a single run raises its error. Raises UserError for
    what refuses the whole command, and Stopped where a signal ended it.

    ``stored``: a run's config.yaml, which the overrides change in place of the groups' files. ``until``:
    seconds since 1970, when ``sweep.budget`` is over if that does not say less. ``compared`` False: no
    table at the end, for callers that compare by themselves.
    """
    began = time.time()
    ranks = meet()
    command = planned(sweep, ranks, stored=stored)
    budget = command.settings.budget
    if budget is not None:
        over = began + seconds_of(budget, key="sweep.budget")
        until = over if until is None else min(until, over)
    if command.several:
        for one in command.outcomes:
            _say_failed(one)
        before = sum(one.state == "finished" for one in command.outcomes)
        if before:
            say(f"{before} of {len(command.order)} runs are finished already")
        outcomes = [*command.outcomes, *_trained(command, ranks, until=until)]
    else:
        outcomes = _alone(command.runs[0], command, ranks, until=until)
    order = {path: number for number, path in enumerate(command.order)}
    outcomes.sort(key=lambda one: -1 if one.run is None else order[one.run.path])
    if compared and is_main():
        report(outcomes, page=command.page)
    return outcomes


def _alone(run: Planned, command: Command, ranks: Meeting, *, until: float | None) -> list[Outcome]:
    """A single run: what it raises is the command's error."""
    if command.settings.launcher != "here":
        found = _trained(command, ranks, until=until, told=lambda _: None)
        if found[0].state == "failed":
            raise UserError(found[0].line)
        return found
    over = until is not None and time.time() >= until
    if ranks.agree(None, over, judge=nobody):
        say(f"the time is over: {run.path} is not started")
        return [Outcome(run, "", "left")]
    train(run.config, until=until)
    return [Outcome(run, "", "finished")]


def _trained(
    command: Command,
    ranks: Meeting,
    *,
    until: float | None,
    told: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Train the runs that are left, by the launcher that was asked for; returns their outcomes. ``told``
    is called with each run that a launcher ended, in place of a line on stderr."""
    settings = command.settings
    total = len(command.order) + sum(one.run is None for one in command.outcomes)
    if settings.launcher == "here":
        progress = Progress(command.runs, total=total, say=say)
        return _here(command.runs, ranks, until=until, progress=progress)
    if ranks.size > 1:
        raise UserError(
            f"sweep.launcher: {settings.launcher} starts the ranks of each run itself; start this command "
            "without torchrun"
        )
    cpu = all(run.config.parallel.device == "cpu" for run in command.runs)
    launcher = Slurm(settings) if settings.launcher == "slurm" else Processes(settings, cpu=cpu)
    progress = Progress(command.runs, total=total, say=say, at_once=launcher.at_once)
    return launcher.train(command.runs, until=until, progress=progress, told=told or _say_failed)


def _here(
    runs: list[Planned], ranks: Meeting, *, until: float | None, progress: Progress
) -> list[Outcome]:
    """Every run in this process (and its ranks), one after the other."""
    found = []
    for run in runs:
        over = until is not None and time.time() >= until
        if ranks.agree(None, over, judge=nobody):
            found.append(Outcome(run, run.told, "left"))
            continue
        progress.start(run)
        found.append(_one_here(run, until=until))
        progress.end(run)
        _say_failed(found[-1])
    return found


def _one_here(run: Planned, *, until: float | None) -> Outcome:
    try:
        train(run.begun, until=until)
    except Stopped as stopped:
        if stopped.by_signal:
            raise  # asked to stop: no further run either
        return Outcome(run, run.told, "left")
    except UserError as error:
        return Outcome(run, run.told, "failed", str(error))
    except Exception as error:
        if meet().size > 1:
            raise  # the other ranks do not know of it: torchrun ends them all
        traceback.print_exc()
        _refuse_lost_device(error)
        return Outcome(run, run.told, "failed", f"{type(error).__name__}: {error}")
    return Outcome(run, run.told, "finished")


def _refuse_lost_device(error: Exception) -> None:
    """After a fault of a kernel every call of this process on its GPU fails: no run could follow."""
    traceback.clear_frames(error.__traceback__)  # they hold the model
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as lost:
        raise UserError(
            f"parallel.device: this process lost its GPU ({first_line(lost)}); the same command "
            "again goes on with the runs that are left"
        ) from None


def say(text: str) -> None:
    """A line of the command's own, on the main rank."""
    if is_main():
        Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _say_failed(one: Outcome) -> None:
    if one.state == "failed" and is_main():
        print(f"fp4pretrain: failed: {sentence(one)}", file=sys.stderr, flush=True)
