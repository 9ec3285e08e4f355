"""The end of a command with several runs: which are finished, the table of the loss gaps, picture and
page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fp4pretrain.errors import UserError
from fp4pretrain.report import Options, compare, table
from fp4pretrain.report.differences import RATE, settings
from fp4pretrain.report.load import Run, load_run, short_names
from fp4pretrain.sweep.planning import Outcome


def report(outcomes: Sequence[Outcome], *, page: Path) -> None:
    """Print the runs, and for those that may be compared the table of their gaps; write the page.

    ``page``: the path of picture and page without a suffix. Finished runs are compared, with what
    ``baseline`` names or else with the first of them; the others are named in the notes. Runs that
    differ in more than the recipe, their seeds and learning rates make a table and a page each.
    """
    if len(outcomes) == 1 and (outcomes[0].run is None or outcomes[0].run.given_baseline is None):
        return
    console = Console(highlight=False, soft_wrap=True)
    remarks = tuple(_remark(one) for one in outcomes if one.state != "finished")
    groups = _groups(outcomes)
    told = False
    for number, paths in enumerate(groups, start=1):
        place = page if len(groups) == 1 else page.with_name(f"{page.name}-{number}")
        try:
            found = compare(
                paths[1:],
                out=place.with_name(f"{place.name}.png"),
                baseline=paths[0],
                options=Options(html=True, remarks=remarks),
            )
        except UserError as error:
            console.print(f"no comparison: {error}", markup=False)
            continue
        told = True
        console.print(table(found))
        for made in (*(paths if len(paths) == 2 else ()), found.picture, found.page):
            console.print(f"wrote {made}", markup=False)
    if not told or remarks:
        Console(highlight=False).print(_states(outcomes))
    for one in outcomes:
        if one.state == "failed":
            console.print(f"failed: {sentence(one)}", markup=False)
    left = sum(one.state == "left" for one in outcomes)
    if left:
        console.print(
            f"{left} of {len(outcomes)} runs are left; the same command goes on with them"
        )


def sentence(one: Outcome) -> str:
    """One line: the combination, and what is wrong with it."""
    return f"{_name(one)}: {' '.join(one.line.split())}"


def _name(one: Outcome) -> str:
    return one.told or ("the run" if one.run is None else str(one.run.path))


def _remark(one: Outcome) -> str:
    if one.state == "failed":
        return f"FAILED: {sentence(one)}."
    return f"Not finished, and not compared: {_name(one)}."


def _groups(outcomes: Sequence[Outcome]) -> list[list[Path]]:
    """Folders that may be compared, each group's baseline first; groups of one run are left out."""
    given = {one.run.path: one.run.given_baseline for one in outcomes if one.run is not None}
    done = [one.run.path for one in outcomes if one.run is not None and one.state == "finished"]
    asked = [path for path in given.values() if path is not None and path not in given]
    groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for path in dict.fromkeys([*asked, *done]):
        try:
            run = load_run(path, name=path.name)
        except UserError:
            continue
        groups.setdefault(_kind(run), []).append(path)
    baselines = set(given.values())
    return [
        sorted(paths, key=lambda path: path not in baselines)
        for paths in groups.values()
        if len(paths) > 1
    ]


def _kind(run: Run) -> tuple[tuple[str, str], ...]:
    """All that shapes a run besides recipe, seeds and learning rate."""
    found = settings(run).items()
    return tuple(sorted((k, v) for k, v in found if k != RATE and not k.startswith("precision.")))


def _states(outcomes: Sequence[Outcome]) -> Table:
    """One row a run: what became of it, how far it came, its last validation loss."""
    shown = Table(title="Runs of this command", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("run", overflow="fold")
    for name in ("state", "step", "loss", "val loss"):
        shown.add_column(name, justify="right", no_wrap=True)
    folders = [one.run.path for one in outcomes if one.run is not None]
    names = dict(zip(folders, short_names(folders), strict=True))
    for one in outcomes:
        state = {"failed": "FAILED"}.get(one.state, one.state)
        name = _name(one) if one.run is None else names[one.run.path]
        shown.add_row(name, state, *_numbers(one))
    return shown


def _numbers(one: Outcome) -> tuple[str, str, str]:
    if one.run is None:
        return "", "", ""
    try:
        run = load_run(one.run.path, name="")
    except UserError:  # it never came to its first step
        return f"0/{one.run.config.train.steps}", "", ""
    last = [f"{curve.values[-1]:.4f}" if len(curve) else "" for curve in (run.loss, run.val_loss)]
    return f"{run.last[0]}/{run.steps}", last[0], last[1]
