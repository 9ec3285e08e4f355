"""``fp4pretrain train`` and ``noise``: runs are trained."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from fp4pretrain.cli.parser import add_overrides, add_verb, path
from fp4pretrain.files import write_text
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.presets import groups

TRAIN_HELP = """\
Train a GPT. Keys are set as key=value (Hydra's grammar); groups pick a YAML file.

  fp4pretrain train precision=nvfp4                      one run, into runs/nvfp4-seed1234
  fp4pretrain train precision=nvfp4 baseline=fp8         first FP8, then NVFP4, then their gap
  fp4pretrain train -m precision=bf16,fp8,nvfp4          a sweep; the same command again does what is left
  fp4pretrain train run_dir=runs/a resume=auto           continue (or start) runs/a
  fp4pretrain train precision=my/recipe.yaml             a file of your own, for every group
  fp4pretrain train --config-dir my precision=recipe     the same from my/precision/recipe.yaml
  fp4pretrain train --config runs/a/config.yaml resume=auto   a run by its own record
  torchrun --nproc-per-node 4 -m fp4pretrain train parallel.tensor=2 parallel.pipeline=2

Groups and their options:
{groups}
Every key with its value: fp4pretrain train --cfg. Keys used most: train.steps, train.micro_batch,
train.global_batch, optim.lr, parallel.tensor, parallel.pipeline, parallel.sequence, data.path, seed,
run_dir, resume, logging.wandb.mode, precision.wgrad.rotation.kind, precision.keep.last_blocks.
"""

NOISE_HELP = """\
What chance alone does to a loss: trains replicates of one config that differ in nothing but the order
of sums, then in the order of data, then in initial weights; prints the standard deviations and which
gap n pairs of runs can see. A second call goes on where the first was stopped.

  fp4pretrain noise precision=bf16 model=gpt_10m data.path=data/corpus --out runs/noise
  fp4pretrain compare runs/* --noise runs/noise/noise.json
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    train = add_verb(
        verbs, "train", "train a model, a sweep, or a recipe with a baseline", _train_help(), _train
    )
    add_overrides(train)
    train.add_argument("-m", "--multirun", action="store_true", help="sweep over a=1,2 values")
    train.add_argument(
        "--config",
        type=path,
        metavar="YAML",
        help="of a run, in place of the groups: runs/a/config.yaml",
    )
    train.add_argument(
        "--until", type=float, metavar="TIME", help="save and stop then (seconds since 1970)"
    )
    train.add_argument("--cfg", action="store_true", help="print the composed config and stop")

    noise = add_verb(verbs, "noise", "what chance alone does to a loss", NOISE_HELP, _noise)
    add_overrides(noise)
    noise.add_argument("--replicates", type=int, default=3, metavar="N", help="of each kind")
    noise.add_argument("--out", type=Path, default=Path("runs/noise"), metavar="DIR")
    noise.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _train_help() -> str:
    offered = groups()
    width = max(map(len, offered))
    indent = " " * (width + 4)
    lines = "".join(
        textwrap.fill(f"  {group:{width}}  {' '.join(options)}", 100, subsequent_indent=indent)
        + "\n"
        for group, options in offered.items()
        if options
    )
    return TRAIN_HELP.format(groups=lines)


def _train(arguments: argparse.Namespace) -> None:
    from fp4pretrain.overrides import expand_sweep

    sweep = expand_sweep(arguments.overrides) if arguments.multirun else [arguments.overrides]
    if arguments.cfg:
        from omegaconf import OmegaConf

        from fp4pretrain.stored import composed

        configs = [
            OmegaConf.to_yaml(OmegaConf.structured(composed(one, arguments.config)))
            for one in sweep
        ]
        print("---\n".join(configs), end="")
        return

    from fp4pretrain.ops.choice import without_triton

    without_triton()  # before megatron-core looks for it
    from fp4pretrain.parallel.groups import leave
    from fp4pretrain.sweep import train_all

    try:
        outcomes = train_all(sweep, stored=arguments.config, until=arguments.until)
    finally:
        leave(destroy=True)
    if any(one.state == "failed" for one in outcomes):
        sys.exit(1)


def _noise(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.parallel.groups import leave
    from fp4pretrain.report import measure_noise, noise_table
    from fp4pretrain.sweep.replicates import train_replicates

    # what training says is for the reader, not for a program
    told = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    try:
        with told:
            paths = train_replicates(
                arguments.overrides, replicates=arguments.replicates, out=arguments.out
            )
    finally:
        leave(destroy=True)
    if not is_main():
        return
    found = measure_noise(paths)
    text = json.dumps(found, indent=1, allow_nan=False)
    file = arguments.out / "noise.json"
    write_text(file, text + "\n")
    if arguments.json:
        print(text)
        return
    console = Console(highlight=False)
    console.print(noise_table(found))
    console.print(str(file))
