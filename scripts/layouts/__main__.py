"""Layouts of n GPUs beside one: do they agree, how do they scale, and what do killed ranks cost.

usage: python scripts/layouts [--gpus N] [--device cpu|cuda] [--out FOLDER] [--parts NAME:SECONDS,...]
                              [--recipes ...] [--layouts ...] [--models ...] [key=value ...]

agreement    losses and gradients of every layout and recipe against one GPU's, a small model in FP32
checkpoints  all ranks' checkpoint on one GPU and on TP 4 and back, bit for bit
scaling      tokens/s, communication, peak memory of whole steps at gpt_6_7b's and gpt_1_3b's widths
kills        two random ranks killed in a run: the undisturbed run's bits

Ranks are started once and do job after job; small jobs run side by side. Each part ends its SECONDS after it
began, with the job it is in. Results go to PART.json in --out as they are known, and to layouts.md; the same
command again does what is missing or failed. Status 1 where something failed or differs. With --device cpu
the ranks are processes on gloo, which is a test of this script and of the laws, and no measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from agreeing import RECIPES, agree, reshard
from killing import kill
from lab import PARTS, Lab, Results, grid, parts_of
from scaling import MODELS, scale
from tables import holds, report


def names_of(text: str, known: tuple[str, ...] | list[str]) -> list[str]:
    """Comma-separated names. Raises ArgumentTypeError."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    seen = torch.cuda.device_count()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if seen else "cpu")
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), default=max(2, seen))
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--work", type=Path, help="for runs and gradients (default: OUT/work)")
    parser.add_argument("--parts", type=parts_of, default=",".join(PARTS))
    parser.add_argument(
        "--recipes", type=partial(names_of, known=RECIPES), help="default: all; scaling bf16,nvfp4"
    )
    parser.add_argument("--layouts", type=partial(names_of, known=list(grid.LAYOUTS)))
    parser.add_argument("--models", type=partial(names_of, known=list(MODELS)))
    parser.add_argument("--batch", type=int, default=32, help="sequences a step on one GPU")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a microbatch")
    arguments, extra = parser.parse_known_args()
    if arguments.device == "cuda" and seen < arguments.gpus:
        parser.error(
            f"--gpus {arguments.gpus}: this machine has {seen}; name fewer or --device cpu"
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as launch/torchrun.sh does
    out = arguments.out.absolute()
    work = (arguments.work or out / "work").absolute()
    lab = Lab(arguments.gpus, arguments.device, out, work, extra)
    layouts = arguments.layouts or grid.fitting(arguments.gpus)
    models = arguments.models or (
        ["gpt_6_7b", "gpt_1_3b"] if arguments.device == "cuda" else ["tiny"]
    )
    recipes = arguments.recipes
    for part, seconds in arguments.parts.items():
        lab.deadline = time.monotonic() + seconds
        results = Results(out / f"{part}.json")
        if part == "agreement":
            agree(lab, results, recipes=recipes or list(RECIPES), layouts=layouts)
        elif part == "checkpoints":
            reshard(lab, results)
        elif part == "scaling":
            chosen = {"models": models, "recipes": recipes or ["bf16", "nvfp4"], "layouts": layouts}
            scale(lab, results, **chosen, batch=(arguments.batch, arguments.micro))
        else:
            kill(lab, results)
        (out / "layouts.md").write_text(report(out), encoding="utf-8")
    lab.pool.close()
    print(report(out), flush=True)
    return 0 if holds(out) else 1


if __name__ == "__main__":
    sys.exit(main())
