"""What a run's folder holds of the run that a command asks for.

A run is finished where its history says so (``finished_step``, written after the last step and the last
save) and its ``config.yaml`` asks for the same: equal keys in all that shapes the curve, an equal plan,
the same text. Keys that shape nothing (logging, layout, names) may differ.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp4pretrain import fingerprint
from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.naming import flat
from fp4pretrain.stored import read_config
from fp4pretrain.train.run_dir import holds_run, read_history

NEW = "new"
GOES_ON = "goes on"
FINISHED = "finished"


def standing(path: Path, config: RunConfig) -> str:
    """NEW, GOES_ON or FINISHED. Raises UserError where the folder holds another run.

    What ``resume`` asks for besides ``auto`` is left to the run itself (NEW), and so is a change against
    the folder's run where the user wrote ``resume=auto``.
    """
    of_a_run = holds_run(path) and (path / "config.yaml").is_file()
    if config.resume not in (None, "auto") or not of_a_run:
        return NEW
    differing = difference(read_config(path), config)
    if differing and config.resume == "auto":
        return GOES_ON
    if differing:
        told = ", ".join(f"{key} is {was} there and {now} here" for key, (was, now) in differing)
        raise UserError(
            f"run_dir: {path} exists already and holds another run ({told}); choose another run_dir "
            "(or name)"
        )
    history = read_history(path) or {}
    return FINISHED if history.get("finished_step") == config.train.steps else GOES_ON


def difference(there: RunConfig, here: RunConfig) -> list[tuple[str, tuple[Any, Any]]]:
    """At most three keys, with both values, in which two configs are not the same run."""
    found = fingerprint.differing(*map(_entries, (there, here)))
    plans = [fingerprint.plan_digest(one, plan_of(one)) for one in (there, here)]
    if plans[0] != plans[1]:
        recipe = fingerprint.differing(*map(fingerprint.recipe_entries, (there, here)))
        found |= recipe or {"precision": (plans[0], plans[1])}
    return list(found.items())[:3]


def _entries(config: RunConfig) -> dict[str, Any]:
    """What shapes the curve. Text is compared by its names, since it is not read here."""
    text = {key for keys in fingerprint.BY_CONTENT.values() for key in keys} - {"data.seed"}
    named = {k: v for k, v in flat(asdict(config)).items() if fingerprint.within(k, text)}
    return fingerprint.entries(config) | named
