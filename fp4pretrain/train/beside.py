"""Several runs in one command: sweeps, and a recipe beside its baseline, compared at the end."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

from rich.console import Console

from fp4pretrain.config import RunConfig, compose
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.report import compare
from fp4pretrain.train.main import check_run, train
from fp4pretrain.train.run_dir import check_free, find_checkpoint, run_path


def train_all(sweep: list[list[str]]) -> list[Path]:
    """Compose and check every run of a sweep, then train them in order.

    A run with ``baseline=RECIPE`` trains that recipe first, on the same seed and data, and ends
    with the table and picture of their gap; runs that share a baseline train it once. Nothing is
    trained until all are known to be possible. Raises UserError.
    """
    common = set(sweep[0]).intersection(*sweep[1:])
    pairs = [_runs(overrides, [o for o in overrides if o not in common]) for overrides in sweep]
    runs: dict[Path, RunConfig] = {}
    for config in chain.from_iterable(pairs):
        path = run_path(config)
        if runs.setdefault(path, config) != config:
            raise UserError(
                f"run_dir: two runs of this sweep would share {path}; give them names that differ "
                "(name, run_dir or precision.name)"
            )
    for path, config in runs.items():
        check_run(config)
        check_free(path, config.resume)
        find_checkpoint(path, config)
    trained: set[Path] = set()
    for pair in pairs:
        paths = [run_path(config) for config in pair]
        for path, config in zip(paths, pair, strict=True):
            if path not in trained:
                train(config)
                trained.add(path)
        if len(pair) > 1:
            _report(paths)
    return list(runs)


def _runs(overrides: list[str], varied: list[str]) -> list[RunConfig]:
    """[run], or [baseline, run]: the run's config with the baseline's recipe in its place."""
    config = compose(overrides)
    if config.baseline is None:
        return [_placed(config, varied)]
    base = replace(config, precision=compose([f"precision={config.baseline}"]).precision)
    if base.precision.name == config.precision.name:
        raise UserError(
            f"baseline: {config.baseline} is the run's own recipe; choose another baseline, or "
            "tell a variant of it apart with precision.name"
        )
    if config.resume not in (None, "auto"):
        raise UserError(
            f"resume: {config.resume} cannot be both the run and its baseline; use resume=auto, "
            "or train without baseline"
        )
    shared = [o for o in varied if not o.startswith(("precision=", "precision."))]
    return [_placed(base, shared), _placed(config, varied)]


def _placed(config: RunConfig, varied: list[str]) -> RunConfig:
    """The run in a folder of its own, named by what a sweep varies.

    runs/nvfp4-seed1234-lr_0.001; beside a baseline, run_dir=runs/demo is runs/demo-nvfp4. Names
    need no quotes in a shell or an override.
    """
    place, shown = str(run_path(config)), {"precision", "seed"}
    if config.run_dir is not None or config.name is not None:
        shown = {"run_dir", "name"}
        if config.baseline is not None:
            place, shown = f"{place}-{config.precision.name}", shown | {"precision"}
    for override in varied:
        key, _, value = override.partition("=")
        if key not in shown:
            word = re.sub(r"[^\w.+-]+", "_", value).strip("_")
            place += f"-{key.rpartition('.')[2]}_{word}"
    return replace(config, run_dir=place, baseline=None)


def _report(trained: list[Path]) -> None:
    if not is_main():
        return
    baseline, run = trained
    comparison = compare([baseline, run], out=run / "compare.png", html=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(comparison.table())
    for path in (baseline, run, comparison.picture, comparison.page):
        if path is not None:
            console.print(f"wrote {path}")
