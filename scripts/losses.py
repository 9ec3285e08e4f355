"""Losses of five steps and of an evaluation for every shipped recipe: run it before and after a refactor.

    python scripts/losses.py > before.json          (any machine; GPUs are used where there are any)
    python scripts/losses.py --compare before.json  (exit 1, with the recipes, where a bit differs)

Numbers are written exactly. A change of a recipe's numbers on purpose belongs in docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "precision"
KEYS = ("loss", "val_loss", "val_loss_bf16", "grad_norm")
OVERRIDES = (
    "data=mock",
    "train.steps=5",
    "train.eval_interval=5",
    "train.log_interval=1",
    "checkpoint.at_end=false",
    "logging=quiet",
    "logging.wandb.mode=disabled",
    "precision.keep.first_blocks=0",
    "precision.keep.last_blocks=1",
)
# Beside the files: the late switch, and MXFP4 as paper B rounds it with a rotation of its own.
VARIANTS = {
    "nvfp4+tail": ("precision=nvfp4", "precision.tail.at=0.5"),
    "nvfp4+4over6": ("precision=nvfp4", "precision.fprop.x.scale=four_over_six"),
}


def recipes() -> dict[str, tuple[str, ...]]:
    """{name: overrides} of every recipe file and of the variants."""
    names = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    return {name: (f"precision={name}",) for name in names} | VARIANTS


def losses(overrides: tuple[str, ...], extra: list[str]) -> dict[str, list[float]]:
    """The series of one run, exact floats."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "fp4pretrain", "train", *OVERRIDES, *overrides, *extra]
        done = subprocess.run(
            [*command, f"run_dir={run}"], capture_output=True, text=True, encoding="utf-8"
        )
        if done.returncode:
            sys.exit(f"{' '.join(overrides)}: {done.stderr.strip().splitlines()[-1:]}")
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return {key: [row[key] for row in rows if row.get(key) is not None] for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compare", type=Path, help="a file that this script wrote")
    parser.add_argument("--only", nargs="*", help="names of recipes; default: all")
    parser.add_argument("overrides", nargs="*", help="further overrides, e.g. model=gpt_30m")
    args = parser.parse_args()
    wanted = {n: o for n, o in recipes().items() if not args.only or n in args.only}
    found = {}
    for name, overrides in wanted.items():
        found[name] = losses(overrides, args.overrides)
        print(f"{name}: {found[name]['loss'][-1]:.6f}", file=sys.stderr, flush=True)
    if args.compare is None:
        json.dump(found, sys.stdout, indent=1)
        return
    before = json.loads(args.compare.read_text(encoding="utf-8"))
    differ = [name for name in found if name in before and found[name] != before[name]]
    for name in differ:
        print(f"{name}: {before[name]} became {found[name]}")
    print(f"{len(found) - len(differ)} of {len(found)} recipes have the same bits")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
