"""``fp4pretrain audit`` and ``bench``: what a run computes here, what casts lose, and how fast it is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fp4pretrain.cli.parser import add_overrides, add_verb, path
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text

BENCH_HELP = """\
Time kernels beside a device copy, linears or whole training steps beside BF16, on this machine's GPU,
or measure what casts lose, or what they take on a CPU (no GPU needed): a table and JSON.

  fp4pretrain bench kernels --out runs/bench
  fp4pretrain bench error                          mean squared errors on N(0, 1), cosine, bias
  fp4pretrain bench casts --precision nvfp4        C++ beside PyTorch on this CPU
  fp4pretrain bench linear --precision nvfp4,mxfp4_h16,fp8
  fp4pretrain bench linear --precision fp8 precision.fprop.fast_accum=false     keys of every recipe
  fp4pretrain bench linear --width 1024,2048,4096,8192    what quantization costs at each width
  fp4pretrain bench linear --width 4096 --precision all   and of every recipe
  fp4pretrain bench step --precision fp8,nvfp4 model=gpt_1_3b data.mock=true train.micro_batch=4
"""

AUDIT_HELP = """\
What each linear of a run will really compute on this machine: format, block, rounding, scale and
rotation of every operand, who multiplies and by which instruction, the share of the FLOPs in each
precision, the rules and the switches to come. Fails where a rule matches nothing, where a recipe
quantizes nothing, or where a named backend cannot run it.

  fp4pretrain audit precision=nvfp4 model=gpt_1_3b
  fp4pretrain audit precision=mxfp4_h16 --json
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    audit = add_verb(
        verbs, "audit", "what each linear of a run really computes", AUDIT_HELP, _audit
    )
    add_overrides(audit)
    audit.add_argument("--json", action="store_true", help="print JSON and nothing else")

    bench = add_verb(verbs, "bench", "time kernels and linears, measure casts", BENCH_HELP, _bench)
    bench.add_argument("what", choices=("kernels", "linear", "step", "error", "casts"))
    add_overrides(bench)
    bench.add_argument(
        "--precision", default="nvfp4,mxfp4_h16,fp8", metavar="RECIPE,...", help="linear: or all"
    )
    bench.add_argument(
        "--width", type=_widths, metavar="D,...", help="linear: an MLP's first, at each hidden size"
    )
    bench.add_argument("--steps", type=int, default=6, metavar="N", help="step: timed steps")
    bench.add_argument(
        "--peer", metavar="TEXT", help="step: a figure of another run to print below"
    )
    bench.add_argument(
        "--engine", action="store_true", help="step: Transformer Engine's modules too, BF16 and FP8"
    )
    bench.add_argument("--out", type=path, default=Path("runs/bench"), metavar="DIR")
    bench.add_argument("--all", action="store_true", help="error: every cast that the tables offer")
    bench.add_argument("--json", action="store_true", help="error: print JSON and nothing else")


def _widths(text: str) -> tuple[int, ...]:
    """Comma-separated hidden sizes. Raises ArgumentTypeError."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give hidden sizes, such as 1024,4096")
    return tuple(int(part) for part in parts)


# What Transformer Engine's modules are timed in: its recipes that a Hopper GPU has.
ENGINE_RECIPES = ("bf16", "fp8", "fp8_delayed")


def _step_configs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The runs of ``bench step``, BF16 first: what the others are compared with."""
    from fp4pretrain.bench.step import PROFILED, WARM
    from fp4pretrain.config import compose

    names = dict.fromkeys(("bf16", *arguments.precision.split(",")))
    steps = f"train.steps={WARM + arguments.steps + PROFILED}"
    shared = [steps, "data.valid_tokens=1024", *arguments.overrides]
    found = {name: compose([f"precision={name}", *shared]) for name in names}
    for name in ENGINE_RECIPES if arguments.engine else ():
        theirs = ["model.implementation=transformer_engine", "train.eval_bf16=false"]
        found[f"{name}, TE"] = compose([f"precision={name}", *shared, *theirs])
    return found


def _audit(arguments: argparse.Namespace) -> None:
    from fp4pretrain.audit import audit, lines
    from fp4pretrain.config import compose
    from fp4pretrain.doctor import device_here

    found = audit(compose(arguments.overrides), device_here())
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print("\n".join(lines(found)))


def _bench(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.bench import casts, error, kernels, linear, timing
    from fp4pretrain.config import compose, plan_of
    from fp4pretrain.ops import choose
    from fp4pretrain.parallel.launch import launched
    from fp4pretrain.presets import groups

    if arguments.what not in ("linear", "step", "casts") and arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]}: bench {arguments.what} follows no recipe; leave the key out, "
            "or use bench linear, step or casts"
        )
    if arguments.what == "error":
        found = error.bench_error(every=arguments.all)
        if arguments.json:
            print(json.dumps(found, indent=1))
            return
        shown = error.table(found)
    elif arguments.what == "step":
        from fp4pretrain.bench import step

        found = step.bench_step(
            _step_configs(arguments), steps=arguments.steps, peer=arguments.peer
        )
        if launched().rank:
            return
        shown = step.table(found)
    elif arguments.what == "casts":
        names = arguments.precision.split(",")
        plans = [plan_of(compose([f"precision={name}", *arguments.overrides])) for name in names]
        found = casts.bench_casts(dict(zip(names, [p.recipe for p in plans], strict=True)))
        shown = casts.table(found)
    elif arguments.what == "kernels":
        found = kernels.bench_kernels()
        shown = kernels.table(found)
    else:
        device = timing.require_gpu()
        every = arguments.precision == "all"
        recipes = {}
        for name in groups()["precision"] if every else arguments.precision.split(","):
            config = compose([f"precision={name}", *arguments.overrides])
            p, plan = config.precision, plan_of(config)
            backend, _ = choose(p.backend, plan, device, mxfp4_emulation=p.mxfp4_emulation)
            recipes[name] = backend, plan.recipe
        if arguments.width:
            found = linear.bench_linear(recipes, linear.of_widths(arguments.width))
            shown = linear.width_table(found)
        else:
            found = linear.bench_linear(recipes)
            shown = linear.table(found)
    Console(highlight=False).print(shown)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.what}.json"
    write_text(path, json.dumps(found, indent=1))
    print(path)
