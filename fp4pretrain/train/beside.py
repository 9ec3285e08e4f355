"""Several runs in one command: sweeps, and a recipe beside its baseline, compared at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from fp4pretrain import __version__
from fp4pretrain.config import RunConfig, compose, plan_of, schema_keys
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import plan_digest, within
from fp4pretrain.naming import flat, shortened, shortest, word
from fp4pretrain.parallel.agreement import attempted
from fp4pretrain.parallel.groups import meet
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.report import Options, compare, table
from fp4pretrain.train.main import check_run, train
from fp4pretrain.train.run_dir import (
    RESTART,
    baseline_path,
    check_free,
    find_checkpoint,
    run_path,
)
from fp4pretrain.train.together import together
from fp4pretrain.version import sources_digest

# What is the main rank's wherever ranks compose it otherwise (a name with the time in it).
_THE_MAIN_RANKS = ("name", "run_dir", "logging.wandb.name")


def train_all(sweep: list[list[str]]) -> list[Path]:
    """Compose and check every run of a sweep, then train them in order.

    A run with ``baseline=RECIPE`` trains that recipe first, on the same seed and data, and ends
    with the table and picture of their gap; runs that share a baseline train it once. Nothing is
    trained until all are known to be possible, on every rank, by the same keys and the same code.
    Raises UserError.
    """
    ranks = meet()
    found, problem = attempted(lambda: _composed(sweep))
    pairs = found or []
    theirs = ranks.agree(problem, _stated(pairs), judge=_unequal)
    names = iter(theirs["names"])
    pairs = together([[_of_main(config, next(names)) for config in pair] for pair in pairs])
    runs, problem = attempted(lambda: _checked(pairs))
    ranks.agree(problem, None, judge=lambda _: {})
    assert runs is not None
    trained: set[Path] = set()
    for pair in pairs:
        paths = [run_path(config) for config in pair]
        for path, config in zip(paths, pair, strict=True):
            if path not in trained:
                train(config)
                trained.add(path)
        given = baseline_path(pair[0])
        if len(pair) > 1 or isinstance(given, Path):
            _report([given, *paths] if isinstance(given, Path) else paths)
    return list(runs)


def _composed(sweep: list[list[str]]) -> list[list[RunConfig]]:
    common = set(sweep[0]).intersection(*sweep[1:])
    return [_runs(overrides, [o for o in overrides if o not in common]) for overrides in sweep]


def _checked(pairs: list[list[RunConfig]]) -> dict[Path, RunConfig]:
    """Every run by its folder."""
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
    return runs


def _stated(pairs: list[list[RunConfig]]) -> dict[str, Any]:
    """What this rank would train, and by which code."""
    configs = [flat(asdict(config)) for config in chain.from_iterable(pairs)]
    names = [[config.pop(key) for key in _THE_MAIN_RANKS] for config in configs]
    return {"code": (__version__, sources_digest()), "configs": configs, "names": names}


def _unequal(stated: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Rank -> in what it differs from the main rank, for those that do."""
    main, *others = stated
    found = {}
    for rank, other in enumerate(others, start=1):
        if other["code"] != main["code"]:
            found[rank] = (
                f"launch: code {' '.join(other['code'])} here and {' '.join(main['code'])} on the "
                "main rank; install one version on every node"
            )
        elif other["configs"] != main["configs"]:
            found[rank] = _unequal_key(other["configs"], main["configs"])
    return found


def _unequal_key(here: list[dict[str, Any]], main: list[dict[str, Any]]) -> str:
    for one, other in zip(here, main, strict=False):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return (
                    f"{key}: {one.get(key)} here and {other.get(key)} on the main rank; start every "
                    "rank with the same keys"
                )
    return f"launch: {len(here)} runs here and {len(main)} on the main rank; start all ranks alike"


def _of_main(config: RunConfig, names: list[Any]) -> RunConfig:
    """The run under the main rank's names."""
    name, run_dir, shown = names
    wandb = replace(config.logging.wandb, name=shown)
    return replace(config, name=name, run_dir=run_dir, logging=replace(config.logging, wandb=wandb))


def _runs(overrides: list[str], varied: list[str]) -> list[RunConfig]:
    """[run], or [baseline, run]: the run's config with the baseline's recipe in its place."""
    config = compose(overrides)
    if config.baseline is None or baseline_path(config) is not None:
        return [_placed(config, varied)]
    base = replace(config, precision=compose([f"precision={config.baseline}"]).precision)
    plans = [plan_digest(one, plan_of(one)) for one in (base, config)]
    if plans[0] == plans[1]:
        raise UserError(
            f"baseline: {config.baseline} is the run's own recipe; choose another baseline or another "
            "precision"
        )
    if config.resume not in (None, "auto", RESTART):
        raise UserError(
            f"resume: {config.resume} cannot be both the run and its baseline; use resume=auto, "
            "or train without baseline"
        )
    shared = [o for o in varied if not o.startswith(("precision=", "precision."))]
    return [_placed(base, shared), _placed(config, varied)]


def _placed(config: RunConfig, varied: list[str]) -> RunConfig:
    """The run in a folder of its own, named by what a sweep varies.

    runs/nvfp4-seed1234-lr_0.001; beside a baseline, run_dir=runs/demo is runs/demo-nvfp4. The recipe's
    own name says in what it differs from its file. Names need no quotes in a shell or an override.
    """
    place = str(run_path(config))
    shown: tuple[str, ...] = ("precision", "seed")
    if config.run_dir is not None or config.name is not None:
        shown = ("run_dir", "name")
        if config.baseline is not None and baseline_path(config) is None:
            place, shown = f"{place}-{config.precision.name}", (*shown, "precision")
    for override in varied:
        key, _, value = override.partition("=")
        if not within(key, shown):
            place += f"-{shortest(key, schema_keys())}_{word(value)}"
            folder, slash, last = place.rpartition("/")
            place = folder + slash + shortened(last)
    given = config.baseline if baseline_path(config) is not None else None
    return replace(config, run_dir=place, baseline=given)


def _report(trained: list[Path]) -> None:
    if not is_main():
        return
    baseline, run = trained
    comparison = compare([baseline, run], out=run / "compare.png", options=Options(html=True))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(comparison))
    for path in (baseline, run, comparison.picture, comparison.page):
        if path is not None:
            console.print(f"wrote {path}")
