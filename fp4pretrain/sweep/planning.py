"""The runs that a command means: every combination composed, placed in a folder of its own and judged.

A combination that cannot be composed, or that cannot run here, is one line of output, and the others go
on. What concerns the command as a whole (two runs of one folder, a folder that holds another run,
ranks that were started unequally) refuses all of it before anything is trained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fp4pretrain import __version__
from fp4pretrain.config import RunConfig, SweepConfig, compose, plan_of, schema_keys
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import plan_digest, within
from fp4pretrain.naming import flat, shortened, shortest, word
from fp4pretrain.parallel.agreement import Meeting, attempted
from fp4pretrain.stored import composed
from fp4pretrain.sweep.standing import FINISHED, GOES_ON, standing
from fp4pretrain.train.main import check_run
from fp4pretrain.train.run_dir import (
    RESTART,
    baseline_path,
    check_free,
    find_checkpoint,
    read_history,
    run_path,
)
from fp4pretrain.train.together import together
from fp4pretrain.version import sources_digest

_NAMES = ("name", "run_dir")
# Keys that all ranks take from the main rank, since their own may differ (a name with the time in it).
_THE_MAIN_RANKS = ("name", "run_dir", "logging.wandb.name")


@dataclass(frozen=True)
class Planned:
    """One run of a command.

    ``told``: the overrides that tell it from the command's other runs; empty where there are none.
    ``given_baseline``: the folder it is compared with: of the run that ``baseline=RECIPE`` trains, or of
    the run that ``baseline=FOLDER`` names. ``own_baseline``: that run is one of this command.
    """

    config: RunConfig
    told: str = ""
    given_baseline: Path | None = None
    own_baseline: bool = False

    @property
    def path(self) -> Path:
        return run_path(self.config)

    @property
    def begun(self) -> RunConfig:
        """The config to begin with now. A baseline of this command that is not finished, since it failed
        or goes on beside this run, has no losses to hold this run's against.

        Raises UserError where such a run has a rule that waits for the gap.
        """
        if not self.own_baseline or self.given_baseline is None:
            return self.config
        if (read_history(self.given_baseline) or {}).get("finished_step"):
            return self.config
        for rule in plan_of(self.config).ordered:
            waits = [one for one in (rule.trigger, rule.release) if one and one.quantity == "gap"]
            if waits:
                raise UserError(
                    f"{rule.key}.trigger: it waits for the gap to {self.given_baseline}, which is not "
                    "finished; give the same command again when it is"
                )
        return replace(self.config, baseline=None)


@dataclass(frozen=True)
class Outcome:
    """What became of a run. ``state``: ``finished``, ``failed``, or ``left`` (for another call of the
    same command). ``line``: why it failed. ``run``: None for a combination that does not compose."""

    run: Planned | None
    told: str
    state: str
    line: str = ""


@dataclass(frozen=True)
class Command:
    """What is to be done. ``runs``: what is left to train, in order; ``outcomes``: what needs no training,
    since it is finished or cannot run. ``order``: the folders of all runs. ``page``: where the
    picture and the page of the whole go, without their suffix."""

    runs: list[Planned]
    outcomes: list[Outcome]
    order: list[Path]
    page: Path
    settings: SweepConfig

    @property
    def several(self) -> bool:
        """Whether there is more than one run, so that one may fail without the others."""
        return len(self.runs) + len(self.outcomes) > 1


def planned(sweep: list[list[str]], ranks: Meeting, *, stored: Path | None = None) -> Command:
    """Compose and judge every run of a sweep, on every rank alike. ``stored``: see ``train_all``.

    ``baseline=RECIPE`` makes two runs of a combination, the recipe first, on the same seed and data; runs
    that share a baseline train it once. Raises UserError for what concerns the command, and where
    no combination is left.
    """
    told = _varied(sweep)
    placing = [[] for _ in sweep] if _places_differ(sweep) else told
    tried = [
        attempted(partial(_runs, overrides, varied, stored))
        for overrides, varied in zip(sweep, placing, strict=True)
    ]
    problems = [problem for _, problem in tried]
    first = None if None in problems else problems[0]
    possible = [
        (runs, " ".join(varied)) for (runs, _), varied in zip(tried, told, strict=True) if runs
    ]
    mine = _stated([run for runs, _ in possible for run in runs], problems)
    theirs = ranks.agree(first, mine, judge=_unequal)
    names = iter(theirs["names"])
    groups = [([_of_main(run, next(names)) for run in runs], what) for runs, what in possible]
    settings = _of_command([run for runs, _ in groups for run in runs])
    shared = together([runs for runs, _ in groups])
    groups = [(runs, what) for runs, (_, what) in zip(shared, groups, strict=True)]
    runs = _by_folder(groups)
    failed = [
        Outcome(None, " ".join(varied), "failed", str(problem))
        for varied, problem in zip(told, problems, strict=True)
        if problem is not None
    ]
    several, order = len(runs) + len(failed) > 1, _folders(runs)
    page = _page(order, sweep, told)
    runs, finished = _continued(runs, ranks) if several else (runs, [])
    ready, refused = _judged(runs, ranks, elsewhere=ranks_elsewhere(settings))
    if not ready and not finished and refused:
        raise refused[0][1]
    outcomes = [Outcome(run, run.told, "finished") for run in finished]
    outcomes += [Outcome(run, run.told, "failed", str(problem)) for run, problem in refused]
    return Command(ready, [*failed, *outcomes], order, page, settings)


def _of_command(configs: Sequence[RunConfig]) -> SweepConfig:
    """The sweep section, one for all."""
    found = [config.sweep for config in configs]
    if any(one != found[0] for one in found):
        raise UserError("sweep: its keys are the whole command's; give each of them one value")
    return found[0]


def _by_folder(groups: Sequence[tuple[list[RunConfig], str]]) -> list[Planned]:
    """Every run once, in order."""
    runs: dict[Path, Planned] = {}
    for configs, told in groups:
        base, own = configs[:-1], configs[-1]
        given = run_path(base[0]) if base else baseline_path(own)
        folder = given if isinstance(given, Path) else None  # else on wandb
        both = [Planned(one, f"baseline of {told}".strip()) for one in base]
        for run in (*both, Planned(own, told, folder, own_baseline=bool(base))):
            run = replace(run, config=replace(run.config, sweep=SweepConfig()))
            if runs.setdefault(run.path, run).config != run.config:
                raise UserError(
                    f"run_dir: two runs of this sweep would share {run.path}; give them names that "
                    "differ (name, run_dir or precision.name)"
                )
    return list(runs.values())


def _continued(runs: list[Planned], ranks: Meeting) -> tuple[list[Planned], list[Planned]]:
    """The runs that are left, going on where their folders hold a part of them, and those finished."""

    def stands() -> list[str]:
        found = []
        for run in runs:
            found.append(standing(run.path, run.config))
            if found[-1] not in (FINISHED, GOES_ON):
                check_free(run.path, run.config.resume)
        return found

    found, problem = attempted(stands) if ranks.rank == 0 else (None, None)
    states = dict(zip(_folders(runs), ranks.agree(problem, found, judge=nobody), strict=True))
    left = [
        replace(run, config=replace(run.config, resume="auto"))
        if states[run.path] == GOES_ON
        else run
        for run in runs
        if states[run.path] != FINISHED
    ]
    return left, [run for run in runs if states[run.path] == FINISHED]


def _folders(runs: Sequence[Planned]) -> list[Path]:
    """The runs' folders, in order."""
    return [run.path for run in runs]


def _varied(sweep: list[list[str]]) -> list[list[str]]:
    """For each combination the overrides that not all combinations share. Of a key given twice the last
    counts."""
    last = [{text.partition("=")[0]: text for text in overrides} for overrides in sweep]
    common = set(last[0].values()).intersection(*(one.values() for one in last[1:]))
    return [[text for text in one.values() if text not in common] for one in last]


def _places_differ(sweep: list[list[str]]) -> bool:
    """Whether every combination has a ``run_dir`` or ``name`` of its own, so that nothing needs to be added
    to it."""
    for key in _NAMES:
        given = [dict(text.split("=", 1) for text in one if "=" in text).get(key) for one in sweep]
        if len(given) > 1 and None not in given and len(set(given)) == len(given):
            return True
    return False


def _page(order: Sequence[Path], sweep: list[list[str]], told: list[list[str]]) -> Path:
    """Where the page goes: for one combination into its run's folder; for several beside the runs, named
    by what they vary."""
    if len(sweep) == 1:
        return order[-1] / "compare"
    values: dict[str, list[str]] = {}
    for override in (text for varied in told for text in varied):
        key, _, value = override.partition("=")
        values.setdefault(key, []).append(word(value))
    parts = [
        "_".join([shortest(key, schema_keys()), *dict.fromkeys(found)])
        for key, found in values.items()
    ]
    folders = [str(path.parent) for path in order]
    place = Path(os.path.commonpath(folders)) if len(set(folders)) > 1 else order[0].parent
    fixed = [text for text in sweep[0] if text not in told[0]]
    given = [value for key, _, value in (o.partition("=") for o in fixed) if key in _NAMES]
    given = [word(value.rpartition("/")[2]) for value in given]
    return place / shortened("-".join([*given, "sweep", *parts]))


def _judged(
    runs: list[Planned], ranks: Meeting, *, elsewhere: int | None
) -> tuple[list[Planned], list[tuple[Planned, UserError]]]:
    """The runs that can be trained here, and those that cannot with the reason."""
    ready, refused = [], []
    for run in runs:
        _, problem = attempted(partial(_check, run, elsewhere))
        try:
            ranks.agree(problem, None, judge=nobody)
        except UserError as error:
            refused.append((run, error))
        else:
            ready.append(run)
    return ready, refused


def _check(run: Planned, elsewhere: int | None) -> None:
    check_run(run.config, elsewhere=elsewhere)
    check_free(run.path, run.config.resume)
    find_checkpoint(run.path, run.config)


def ranks_elsewhere(settings: SweepConfig) -> int | None:
    """Ranks of each run, where other processes train it; None for this process and its ranks."""
    if settings.launcher == "here":
        return None
    return settings.ranks * int((settings.slurm or {}).get("nodes", 1))


def nobody(_: Sequence[Any]) -> dict[int, str]:
    """Used where ranks need not be compared: it finds no rank unequal."""
    return {}


def _stated(runs: list[RunConfig], problems: Sequence[UserError | None]) -> dict[str, Any]:
    """What this rank would train, and by which code."""
    configs = [flat(asdict(config)) for config in runs]
    names = [[config.pop(key) for key in _THE_MAIN_RANKS] for config in configs]
    return {
        "code": (__version__, sources_digest()),
        "configs": configs,
        "names": names,
        "problems": [None if one is None else str(one) for one in problems],
    }


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
        elif other["problems"] != main["problems"]:
            unlike = zip(other["problems"], main["problems"], strict=False)
            found[rank] = next(
                (a or f"{b} (on the main rank)" for a, b in unlike if a != b),
                "launch: another number of runs; start all ranks alike",
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
    """The run with the folder and names that the main rank gave it."""
    name, run_dir, shown = names
    wandb = replace(config.logging.wandb, name=shown)
    return replace(config, name=name, run_dir=run_dir, logging=replace(config.logging, wandb=wandb))


def _runs(overrides: list[str], varied: list[str], stored: Path | None) -> list[RunConfig]:
    """[run], or [baseline, run]: the run's config with the baseline's recipe in its place."""
    config = composed(overrides, stored)
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
