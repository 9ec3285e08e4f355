"""``fp4pretrain culprit``: which casts of a trained model cost the most."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp4pretrain.cli.parser import add_config_dir, add_verb
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.launch import is_main

HELP = """\
Which casts of a trained model cost the most: from a run's newest checkpoint, one GEMM, operand, linear
or layer at a time is quantized and the rest is BF16. On held-out batches the parts are ranked by the
error of the weight gradients (or by the change of the loss: only casts of the forward pass have one),
with 90% intervals over the batches. Nothing is trained and nothing in the run's folder changes.

  fp4pretrain culprit runs/nvfp4-seed1234
  fp4pretrain culprit runs/bf16-seed1234 --precision mxfp4_h16 --by layer,cell
  fp4pretrain culprit runs/nvfp4-seed1234 --fix 0.15            rules that bring the gradient error to 15%
  fp4pretrain culprit runs/nvfp4-seed1234 --rank loss --fix 0.005

A cell is a GEMM of a layer. --fix prints rules for precision.rules: the fewest of the worst cells in
BF16 with which the rest meets the target.
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    parser = add_verb(verbs, "culprit", "which casts of a trained model cost the most", HELP, _work)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--precision", metavar="RECIPE", help="another recipe, for these weights")
    add_config_dir(parser)
    parser.add_argument("--by", default="gemm,operand,linear,layer", metavar="KIND,...")
    parser.add_argument("--batches", type=int, default=4, metavar="N")
    parser.add_argument("--rank", choices=("gradient", "loss"), default="gradient")
    parser.add_argument("--fix", type=float, metavar="TARGET", help="a fraction: 0.15 is 15%%")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _work(arguments: argparse.Namespace) -> None:
    """Measure, and print a table or JSON on the main rank."""
    from fp4pretrain.parallel.groups import leave
    from fp4pretrain.train.culprit import find_culprit
    from fp4pretrain.train.culprit.parts import KINDS

    kinds = arguments.by.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"by: {kind!r} is no kind of part; choose {', '.join(KINDS)}")
    if arguments.batches < 1:
        raise UserError(f"batches: {arguments.batches} measure nothing; give 1 or more")
    if arguments.fix is not None and not 0 <= arguments.fix < math.inf:
        raise UserError(f"fix: {arguments.fix} is no target; give a fraction such as 0.15")
    told = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    try:
        with told:
            found = find_culprit(
                arguments.run,
                precision=arguments.precision,
                kinds=kinds,
                batches=arguments.batches,
                measure=arguments.rank,
                target=arguments.fix,
            )
    finally:
        leave(destroy=True)
    if not is_main():
        return
    if arguments.json:
        print(json.dumps(_finite(asdict(found)), indent=1, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(found))
    if found.fix is not None:
        if not found.fix.cells:
            console.print(f"{found.measure}: the target is met as it is; no rule is needed")
        else:
            print(found.fix.rules, end="")


def table(found: Any) -> Any:
    """Parts by kind, the worst first, in per cent."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        title=f"Quantized alone, step {found.step}; worst {found.measure} first",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=f"± is half of the 90% interval over {found.batches} held-out batches.",
        caption_justify="left",
    )
    for name in ("by", "part"):
        shown.add_column(name)
    for name in ("gradient error %", "loss %"):
        shown.add_column(name, justify="right")
    for kind, ranked in found.ranked.items():
        for number, one in enumerate(ranked):
            last = number == len(ranked) - 1
            shown.add_row(kind if number == 0 else "", *_cells(one), end_section=last)
    shown.add_row("", *_cells(found.whole))
    return shown


def _cells(one: Any) -> tuple[str, str, str]:
    return (
        one.part,
        _number(one.gradient, one.gradient_interval, "{:.2f}"),
        _number(one.loss, one.loss_interval, "{:+.3f}"),
    )


def _number(mean: float, around: Any, form: str) -> str:
    if not math.isfinite(mean):
        return "not finite"
    half = "" if around is None else f" ± {100 * around.half:.2g}"
    return form.format(100 * mean) + half


def _finite(value: Any) -> Any:
    """JSON has no NaN and no Inf: null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
