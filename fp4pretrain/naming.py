"""What a run is called: by its recipe's file and by what differs from that file.

Two runs of one name should be the same recipe and two recipes never share a name, so the differences
are spelled out with as much of each key as tells it from every other key:
``nvfp4-wgrad.rotation.kind_none``. What a user or an experiment names itself keeps that name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from fp4pretrain.precision_config import RuleConfig
from fp4pretrain.presets import option_file

# Keys of the section that do not change the recipe: its backend, and its name.
NOT_THE_RECIPE = ("precision.name", "precision.backend")
_LONGEST = 120  # characters; file systems take 255 for the whole name


def recipe_name(
    recipe: Mapping[str, Any],
    *,
    option: str,
    experiment: str | None,
    plain: Callable[[str], Mapping[str, Any]],
    given: Collection[str],
) -> str:
    """The name of a composed precision section.

    Args:
        recipe: the section, as plain data.
        option: the file of ``configs/precision`` that was chosen.
        experiment: the file of ``configs/experiment``, or None.
        plain: gives the section that one override alone composes to.
        given: the keys that the user gave.
    """
    if "precision.name" in given:
        return str(recipe["name"])
    own, file = _file("precision", option).get("name", option), f"precision={option}"
    if experiment is not None and "precision" not in given:
        stated = (_file("experiment", experiment).get("precision") or {}).get("name")
        if stated is not None:
            own, file = stated, f"experiment={experiment}"
    there, here = flat(plain(file), "precision."), flat(recipe, "precision.")
    changed = {
        key.removeprefix("precision."): value
        for key, value in here.items()
        if key not in NOT_THE_RECIPE and value != there.get(key, _unset(key))
    }
    keys = {key.removeprefix("precision.") for key in here}
    parts = [f"{shortest(key, keys)}_{word(value)}" for key, value in changed.items()]
    return shortened("-".join([str(own), *parts]))


def _unset(key: str) -> Any:
    """The defaults: of a rule's keys where the rule does not give them, and the empty map of rules."""
    if key == "precision.rules":
        return {}
    return flat(asdict(RuleConfig())).get(key.split(".", 3)[-1])


def shortest(key: str, keys: Collection[str]) -> str:
    """The shortest end of a dotted key that no other of ``keys`` has too."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        if not any(k != key and (k == tail or k.endswith(f".{tail}")) for k in keys):
            return tail
    return key


def word(value: Any) -> str:
    """A value as part of a name: no quotes needed in a shell, no folder made."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if not isinstance(value, list) else "_".join(map(str, value))
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "none"


def shortened(name: str) -> str:
    """A name too long for a folder, cut and told apart by a digest of the whole."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def shared_beginning(names: Sequence[str]) -> str:
    """What all names begin with, up to a -, / or _."""
    first, last = min(names), max(names)  # what these two share, all share
    length = next(
        (i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0
    )
    shared = first[:length]
    return shared[: max(shared.rfind(mark) for mark in "-/_") + 1]


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _file(group: str, option: str) -> dict[str, Any]:
    file = option_file(group, option)
    assert file is not None, (group, option)  # it was composed from it
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
