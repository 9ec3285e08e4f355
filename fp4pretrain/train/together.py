"""What the runs of one command share: a wandb group, job types, and the baseline they are held against."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from fp4pretrain.config import RunConfig
from fp4pretrain.naming import shared_beginning
from fp4pretrain.train.run_dir import run_path

BASELINE, TRAIN = "baseline", "train"


def together(pairs: Sequence[Sequence[RunConfig]]) -> list[list[RunConfig]]:
    """The runs of a command, each alone or behind its baseline, as one experiment.

    Runs get a common group and the job types ``baseline`` and ``train``, as far as neither
    ``logging.wandb`` nor wandb's own variables say others. The group's name follows from the runs'
    folders, so the same command, given again, goes on in the same group. A run behind its baseline has
    the baseline's folder as ``baseline``, so its evaluations log the gap; where that is not finished when
    the run begins, they do not (``sweep.planning.Planned.begun``).
    """
    paths = sorted({run_path(config) for config in chain.from_iterable(pairs)})
    if len(paths) < 2:
        return [list(pair) for pair in pairs]
    group = _group(paths)
    bases = {run_path(pair[0]) for pair in pairs if len(pair) > 1}
    found = []
    for pair in pairs:
        *base, run = pair
        if base:
            run = replace(run, baseline=str(run_path(base[0])))
        found.append([_named(one, group, bases) for one in (*base, run)])
    return found


def _named(config: RunConfig, group: str, bases: set[Path]) -> RunConfig:
    w = config.logging.wandb
    job_type = BASELINE if run_path(config) in bases else TRAIN
    if w.group is None and not os.environ.get("WANDB_RUN_GROUP"):
        w = replace(w, group=group)
    if w.job_type is None and not os.environ.get("WANDB_JOB_TYPE"):
        w = replace(w, job_type=job_type)
    return replace(config, logging=replace(config.logging, wandb=w))


def _group(paths: Sequence[Path]) -> str:
    """What the folders' names begin with, or where they lie, and a digest of them all."""
    begin = shared_beginning([path.name for path in paths]).strip("-_.")
    whole = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:8]
    return f"{begin or paths[0].absolute().parent.name}"[:100] + f"-{whole}"
