"""``fp4pretrain compare`` and ``dashboard``: where runs are looked at beside each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fp4pretrain.cli.parser import add_verb, path

COMPARE_HELP = """\
The loss gap of runs to a baseline (the first run, or --baseline) at matched tokens: a table, a PNG
and with --html one self-contained page. Refuses runs that differ in more than the recipe; those that
differ in their seeds alone are one row. Pairs of runs of one seed give its gap a 90% interval and a
verdict: behind, ahead or undecided. Where a recipe has runs of several optim.lr, its best is compared.

  fp4pretrain compare runs/demo-fp8 runs/demo-nvfp4 --out runs/demo.png
  fp4pretrain compare runs/fp8-seed* runs/nvfp4-seed*
  fp4pretrain compare runs/* --baseline runs/bf16-seed1 --json
  fp4pretrain compare runs/* --watch                            the page, live, while runs go on
"""

DASHBOARD_HELP = """\
Saves a view of a project on wandb that is made for these runs: charts over tokens of losses, gaps, the
optimizer, throughput, casts and events, and runs sorted by their final gap. Needs wandb-workspaces
(pip install 'fp4pretrain[wandb]') and an API key. Prints the view's address.

  fp4pretrain dashboard my-team/fp4pretrain
  fp4pretrain dashboard my-team/fp4pretrain --group runs-1f0c22ab      the runs of one sweep
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    compare = add_verb(
        verbs, "compare", "the loss gap between finished runs", COMPARE_HELP, _compare
    )
    compare.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR")
    compare.add_argument("--baseline", type=path, metavar="RUN_DIR")
    compare.add_argument("--out", type=path, default=Path("runs"), metavar="PNG or DIR")
    compare.add_argument("--html", action="store_true", help="write a page beside the picture")
    compare.add_argument(
        "--watch", action="store_true", help="serve the page on this machine while the runs go on"
    )
    compare.add_argument("--port", type=int, default=8008, help="of --watch (0: any)")
    compare.add_argument("--force", action="store_true", help="compare unequal runs too")
    compare.add_argument(
        "--noise", type=Path, metavar="JSON", help="of one run, for the interval of a single pair"
    )
    compare.add_argument("--json", action="store_true", help="print JSON and nothing else")
    dashboard = add_verb(
        verbs, "dashboard", "save a view of runs on wandb", DASHBOARD_HELP, _dashboard
    )
    dashboard.add_argument("project", metavar="ENTITY/PROJECT")
    dashboard.add_argument("--group", help="the runs of one group alone")
    dashboard.add_argument("--name", default="fp4pretrain", help="of the view")


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.report import Comparison, Options, as_json, compare, read_noise, table

    options = Options(
        force=arguments.force,
        html=arguments.html,
        noise=None if arguments.noise is None else read_noise(arguments.noise),
    )

    def compared() -> Comparison:
        return compare(
            arguments.runs, out=arguments.out, baseline=arguments.baseline, options=options
        )

    if arguments.watch:
        from fp4pretrain.report.watch import Watched, watch

        folders = [*arguments.runs, *([arguments.baseline] if arguments.baseline else [])]
        watch(Watched(folders, compared), port=arguments.port, say=lambda t: print(t, flush=True))
        return
    comparison = compared()
    if arguments.json:
        print(json.dumps(as_json(comparison), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print(table(comparison))
    for made in (comparison.picture, comparison.page):
        if made is not None:
            console.print(str(made))


def _dashboard(arguments: argparse.Namespace) -> None:
    from fp4pretrain.observe.wandb_view import save_view

    print(save_view(arguments.project, group=arguments.group, name=arguments.name))
