"""``fp4pretrain bench`` and ``doctor``: what this machine can do, and how fast."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fp4pretrain.cli.parser import add_verb, path
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text

BENCH_HELP = """\
Time kernels beside a device copy, or linears beside BF16, on this machine's GPU: a table and JSON.

  fp4pretrain bench kernels --out runs/bench
  fp4pretrain bench linear --precision nvfp4,mxfp4_h16,fp8
  fp4pretrain bench linear --precision fp8 precision.fprop.fast_accum=false     keys of every recipe
"""

DOCTOR_HELP = """\
What this machine can run: which backend takes each GEMM of a recipe, by which matrix instruction,
or why it cannot.

  fp4pretrain doctor
  fp4pretrain doctor --precision mxfp4_h16
  fp4pretrain doctor precision=mxfp4_h16 precision.mxfp4_emulation=bf16     any key of train
"""


def add(verbs: Any) -> None:
    bench = add_verb(verbs, "bench", "time kernels or linears on this GPU", BENCH_HELP, _bench)
    bench.add_argument("what", choices=("kernels", "linear"))
    bench.add_argument("overrides", nargs="*", metavar="key=value")
    bench.add_argument("--precision", default="nvfp4,mxfp4_h16,fp8", metavar="RECIPE,...")
    bench.add_argument("--out", type=path, default=Path("runs/bench"), metavar="DIR")

    doctor = add_verb(
        verbs, "doctor", "what this machine can run, and why not", DOCTOR_HELP, _doctor
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.add_argument("--precision", default="nvfp4", metavar="RECIPE")


def _bench(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.bench import kernels, linear, timing
    from fp4pretrain.config import compose, plan_of
    from fp4pretrain.ops import choose

    if arguments.what == "kernels":
        if arguments.overrides:
            raise UserError(
                f"{arguments.overrides[0]}: bench kernels follows no recipe; leave the key out, or "
                "use bench linear"
            )
        found = kernels.bench_kernels()
        shown = kernels.table(found)
    else:
        device = timing.require_gpu()
        recipes = {}
        for name in arguments.precision.split(","):
            config = compose([f"precision={name}", *arguments.overrides])
            p, plan = config.precision, plan_of(config)
            backend, _ = choose(p.backend, plan, device, mxfp4_emulation=p.mxfp4_emulation)
            recipes[name] = backend, plan.recipe
        found = linear.bench_linear(recipes)
        shown = linear.table(found)
    Console(highlight=False).print(shown)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.what}.json"
    write_text(path, json.dumps(found, indent=1))
    print(path)


def _doctor(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.config import compose, plan_of
    from fp4pretrain.doctor import table

    config = compose([f"precision={arguments.precision}", *arguments.overrides])
    emulation = config.precision.mxfp4_emulation
    recipe = plan_of(config).recipe
    Console(highlight=False).print(table(config.precision.name, recipe, mxfp4_emulation=emulation))
