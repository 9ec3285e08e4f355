"""Several runs in one command: sweeps, and a recipe beside its baseline, compared at the end."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fp4pretrain.config import RunConfig, compose
from fp4pretrain.errors import UserError
from fp4pretrain.presets import groups
from fp4pretrain.report import compare
from fp4pretrain.train.main import check_run, train
from fp4pretrain.train.run_dir import check_free, run_path


def train_all(sweep: list[list[str]]) -> list[Path]:
    """Compose and check every run of a sweep, then train them in order.

    A run with ``baseline=RECIPE`` trains that recipe first, in a folder beside its own, on the same
    seed and data, and ends with the table and picture of their gap. Nothing is trained until all
    are known to be possible. Raises UserError.
    """
    runs = [_with_baseline(overrides) for overrides in sweep]
    if len(sweep) > 1:
        runs = _apart(runs, sweep)
    paths = [run_path(config) for group in runs for config in group]
    for path in {p for p in paths if paths.count(p) > 1}:
        raise UserError(
            f"run_dir: two runs of this sweep would share {path}; sweep name or seed too"
        )
    for group in runs:
        for config in group:
            check_run(config)
            check_free(run_path(config), config.resume)
    for group in runs:
        trained = [train(config) for config in group]
        if len(group) > 1:
            _report(trained)
    return paths


def _with_baseline(overrides: list[str]) -> list[RunConfig]:
    """[run], or [baseline, run] with the baseline's recipe in place of the run's."""
    config = compose(overrides)
    if config.baseline is None:
        return [config]
    offered = groups()["precision"]
    if config.baseline not in offered:
        raise UserError(f"baseline: {config.baseline!r} is no recipe; choose {', '.join(offered)}")
    if config.baseline == config.precision.name:
        raise UserError(
            f"baseline: {config.baseline} is the run's own recipe; choose another baseline"
        )
    keys = ("precision", "baseline", "run_dir", "name")
    shared = [
        o for o in overrides if not o.startswith(tuple(f"{k}{c}" for k in keys for c in "=."))
    ]
    base = compose([*shared, f"precision={config.baseline}"])
    # Each takes the pair's place with its recipe appended: runs/demo-fp8 beside runs/demo-nvfp4.
    place = (
        run_path(config) if config.run_dir or config.name else Path("runs") / f"seed{config.seed}"
    )
    return [
        replace(c, run_dir=f"{place}-{c.precision.name}", baseline=None) for c in (base, config)
    ]


def _apart(runs: list[list[RunConfig]], sweep: list[list[str]]) -> list[list[RunConfig]]:
    """Give the runs of a sweep folders of their own, named by what differs between them."""
    common = set(sweep[0]).intersection(*sweep[1:])
    named = []
    for group, overrides in zip(runs, sweep, strict=True):
        varied = [o for o in overrides if o not in common]
        label = ",".join(o.replace("/", "_") for o in varied)
        named.append(
            [
                replace(
                    c,
                    run_dir=f"{run_path(c)},{label}"
                    if _placed(c) or _hidden(varied)
                    else c.run_dir,
                )
                for c in group
            ]
        )
    return named


def _placed(config: RunConfig) -> bool:
    return config.run_dir is not None or config.name is not None


def _hidden(varied: list[str]) -> bool:
    """Whether something other than what the default folder's name shows is swept."""
    return any(not o.startswith(("precision=", "seed=")) for o in varied)


def _report(trained: list[Path]) -> None:
    if int(os.environ.get("RANK", "0")) != 0:
        return
    baseline, run = trained
    comparison = compare([baseline, run], out=run / "compare.png", html=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(comparison.table())
    for path in (baseline, run, comparison.picture, comparison.page):
        if path is not None:
            console.print(f"wrote {path}")
