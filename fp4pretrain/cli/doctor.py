"""``fp4pretrain doctor``: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fp4pretrain.cli.parser import add_overrides, add_verb
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.presets import groups

HELP = """\
What this machine can run: versions, who takes every recipe, which backend takes each GEMM of one recipe,
by which matrix instruction, or why it cannot. Then it tries what a run relies on: stochastic rounding
without bias, rotations that cancel, collectives, room on the disk, wandb. Status 1 if a test fails.

  fp4pretrain doctor
  fp4pretrain doctor --precision mxfp4_h16
  torchrun --nproc-per-node 2 -m fp4pretrain doctor           collectives too
  fp4pretrain doctor precision=mxfp4_h16 precision.mxfp4_emulation=bf16     any key of train
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    parser = add_verb(verbs, "doctor", "what this machine can run, and why not", HELP, _work)
    add_overrides(parser)
    parser.add_argument("--precision", default="nvfp4", metavar="RECIPE")


def _work(arguments: argparse.Namespace) -> None:
    """Try, and print tables and a line for each test on the main rank."""
    from rich.console import Console

    from fp4pretrain.config import compose, plan_of
    from fp4pretrain.doctor import device_here, recipes_table, table
    from fp4pretrain.ops import choose
    from fp4pretrain.parallel.groups import join, leave, world_size
    from fp4pretrain.selftests import self_tests
    from fp4pretrain.train.adam import adam_here
    from fp4pretrain.version import versions

    config = compose([f"precision={arguments.precision}", *arguments.overrides])
    p, plan = config.precision, plan_of(config)
    device = device_here()
    if world_size() > 1:
        device = join(device=device).device
    backend, _ = choose(p.backend, plan, device, mxfp4_emulation=p.mxfp4_emulation)
    try:
        outcomes = self_tests(backend, plan.recipe, device)
    finally:
        leave(destroy=True)
    if is_main():
        console = Console(highlight=False)
        console.print(", ".join(f"{name} {number}" for name, number in versions().items()))
        console.print(f"optimizer: {adam_here(device)}", markup=False, soft_wrap=True)
        names = groups()["precision"]
        plans = [plan_of(compose([f"precision={name}"])) for name in names]
        console.print(recipes_table(names, plans, device))
        console.print(table(p.name, plan.recipe, mxfp4_emulation=p.mxfp4_emulation))
        for one in outcomes:
            cure = f"; {one.cure}" if one.cure else ""
            told = f"{'ok' if one.good else 'BAD':4}{one.name}: {one.found}{cure}"
            console.print(told, markup=False, soft_wrap=True)
    if not all(one.good for one in outcomes):
        sys.exit(1)
