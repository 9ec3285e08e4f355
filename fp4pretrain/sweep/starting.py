"""A run in processes of its own: what it is told, and what became of it.

The composed config goes into the run's folder (``start.yaml``), and ``fp4pretrain train --config`` trains
it: a baseline that a combination implies, or a name made of what is swept, could not be said in overrides.
What the processes print is in ``output.log``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from omegaconf import OmegaConf

from fp4pretrain.files import write_text
from fp4pretrain.sweep.planning import Outcome, Planned
from fp4pretrain.train.run_dir import LOG, START, read_history

_ERROR = re.compile(r"(?:\[rank\d+\]: *)?[\w.]*(?:Error|Exception)\b")  # a traceback's last line


def arguments(run: Planned, *, until: float | None) -> list[str]:
    """Write what the run starts with; the arguments of ``fp4pretrain train``. ``until``: see ``train``.

    It goes on from its checkpoint also where it is started more than once.
    """
    config = replace(run.begun, resume=run.config.resume or "auto")
    run.path.mkdir(parents=True, exist_ok=True)
    file = run.path / START
    write_text(file, OmegaConf.to_yaml(OmegaConf.structured(config)))
    return ["--config", str(file), *([] if until is None else ["--until", str(until)])]


def open_log(run: Path) -> BinaryIO:
    """Where the processes of the run in this folder print; to be closed by the caller."""
    return (run / LOG).open("ab")


def outcome(run: Planned, *, problem: str | None) -> Outcome:
    """What became of the run, by its own history. ``problem``: why its processes failed; None where they
    did not."""
    history = read_history(run.path) or {}
    if history.get("finished_step") == run.config.train.steps:
        return Outcome(run, run.told, "finished")
    if problem is None:
        return Outcome(run, run.told, "left")
    return Outcome(run, run.told, "failed", problem)


def last_words(path: Path) -> str:
    """The line in which a run's processes said what was wrong: fp4pretrain's own, or else an error's (not
    torchrun's, which only says that a rank failed), or else the last one."""
    file = path / LOG
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    said = [
        line.removeprefix("fp4pretrain: ") for line in lines if line.startswith("fp4pretrain: ")
    ]
    errors = [line for line in lines if _ERROR.match(line) and "ChildFailedError" not in line]
    words = [line for line in lines if line.strip()]
    return (said or errors or words or ["it said nothing"])[-1]
