"""``fp4pretrain launch``: the scripts that start runs on many GPUs and nodes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fp4pretrain.cli.parser import add_verb, path
from fp4pretrain.errors import UserError
from fp4pretrain.files import write_text
from fp4pretrain.presets import launch_dir

LAUNCH_HELP = """\
Write the scripts that start runs: torchrun.sh (one node or several) and slurm.sbatch, which calls it.

  fp4pretrain launch                       into launch/
  fp4pretrain launch --print slurm         one of them to the console
  launch/torchrun.sh model=gpt_100m precision=nvfp4
  sbatch -N 2 launch/slurm.sbatch model=gpt_6_7b parallel.tensor=8 resume=auto
"""
SCRIPTS = {"torchrun": "torchrun.sh", "slurm": "slurm.sbatch"}


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    launch = add_verb(verbs, "launch", "scripts for many GPUs and nodes", LAUNCH_HELP, _launch)
    launch.add_argument("--out", type=path, default=Path("launch"), metavar="DIR")
    launch.add_argument("--print", choices=tuple(SCRIPTS), dest="shown", help="write no file")


def _launch(arguments: argparse.Namespace) -> None:
    if arguments.shown is not None:
        print((launch_dir() / SCRIPTS[arguments.shown]).read_text(encoding="utf-8"), end="")
        return
    texts = {name: (launch_dir() / name).read_text(encoding="utf-8") for name in SCRIPTS.values()}
    for name, text in texts.items():
        place = arguments.out / name
        if place.exists() and place.read_text(encoding="utf-8") != text:
            raise UserError(f"out: {place} says something else; move it, or name another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        place = arguments.out / name
        write_text(place, text)
        place.chmod(place.stat().st_mode | 0o111)
        print(place)
