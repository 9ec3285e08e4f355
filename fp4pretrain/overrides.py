"""What a user typed, in Hydra's grammar, held to the keys that exist; and Hydra's errors in a line.

Hydra would let ``+key=value`` add a key that nothing reads and ``~key`` take one away. Every key is
in the schema already, so both are refused here, before Hydra composes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from yaml import MarkedYAMLError

from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path
from fp4pretrain.presets import SUFFIXES, groups, offer, use_file

RULE_KEYS = (
    *("recipe", "gemms", "blocks", "linears", "modules"),
    *("start", "stop", "trigger", "release"),
)

# A part of OmegaConf's reason -> the cure.
_CURES = {
    "Integer": "give a whole number",
    "Float": "give a number",
    "valid bool": "give true or false",
    "not Optional": "it cannot be null",
    "Cannot merge": "set the keys inside it, one by one",
    "ListConfig": "give a list such as [a,b]",
    "subclass of str": "give a list of words such as [a,b]",
    "subclass": "set the keys inside it, one by one",
    "to string": "give a word",
    "andatory": "give it a value",
    "nterpolation": "write the value itself",
}

# Removed keys -> what replaced them.
_REPLACED = {
    "train.eval_batches": "an evaluation reads the whole validation set; its size is data.valid_tokens",
    "checkpoint.allow_recipe_change": "name what may differ: resume_with=[precision]",
}
# Maps whose keys are names of the user's.
_NAMED = ("data.path.", "data.valid.")


# Groups that default to null, which is none of their options.
_MAY_BE_EMPTY = ("experiment",)


def names_nothing(text: str) -> bool:
    """Whether an override sets a group to its default, null, which Hydra takes in a file only."""
    override = parsed(text)
    return override.key_or_group in _MAY_BE_EMPTY and override.value() is None


def naming_files(overrides: Sequence[str]) -> list[str]:
    """``precision=my/recipe.yaml`` as ``precision=recipe``, its file an option from now on; the same for
    every group, and for ``baseline``. Raises UserError as ``use_file``."""
    offered = groups()
    found = []
    for text in overrides:
        key, _, value = text.partition("=")
        group, given = ("precision" if key == "baseline" else key), value.strip("'\"")
        if group in offered and given.endswith(SUFFIXES):
            text = f"{key}={use_file(group, user_path(given, key=key))}"
        found.append(text)
    return found


def refuse_unknown(overrides: Sequence[str], *, keys: Collection[str]) -> None:
    """Raises UserError for an override that cannot be read, or sets no key of ``keys``, or names an
    option that its group lacks, or holds several values (a sweep's)."""
    offered = groups()
    for text in overrides:
        override = parsed(text)
        name, _, value = text.partition("=")
        key = name.lstrip("+~")
        free = key.startswith(_NAMED) or _of_a_rule(key, keys)
        if key not in keys and key not in offered and not free:
            raise UserError(unknown_key(key, keys))
        if name != key:
            raise UserError(
                f"{key}: keys are set, never added (+) or taken away (~); write {key}=VALUE"
            )
        if override.is_sweep_override():
            raise UserError(
                f"{key}: {value} is several values; sweep them with `fp4pretrain train -m`, or "
                f"quote a value that has commas: \"{key}='{value}'\""
            )
        if key in offered:
            _check_options(key, override.value(), offered[key])


def adding_rules(overrides: Sequence[str]) -> list[str]:
    """Overrides of rules as Hydra takes them: one a rule, which adds it or changes the file's.

    ``precision.rules.a.recipe=fp8 precision.rules.a.fprop.x.block=row`` becomes
    ``++precision.rules.a={recipe: fp8, fprop: {x: {block: row}}}``.
    """
    rules: dict[str, Any] = {}
    others = []
    for text in overrides:
        if not text.startswith(_RULES):
            others.append(text)
            continue
        key, _, value = text.removeprefix(_RULES).partition("=")
        node = rules
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return others + [f"++{_RULES}{name}={_grammar(rule)}" for name, rule in rules.items()]


def _grammar(node: Any) -> str:
    """Nested values in Hydra's grammar; leaves are that grammar already."""
    if not isinstance(node, dict):
        return node
    return "{" + ", ".join(f"{key}: {_grammar(value)}" for key, value in node.items()) + "}"


_RULES = "precision.rules."


def _of_a_rule(key: str, keys: Collection[str]) -> bool:
    """Whether it is precision.rules.NAME.KEY with a key that rules have (or a GEMM's inside one)."""
    if not key.startswith(_RULES):
        return False
    _, _, inside = key.removeprefix(_RULES).partition(".")
    if inside.split(".")[0] in ("fprop", "dgrad", "wgrad"):
        return f"precision.{inside}" in keys
    return inside in RULE_KEYS


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Hydra's sweep grammar (``a=1,2 b=choice(x,y) c=range(0,3)``) as one list of overrides a run.

    Raises UserError for what cannot be read.
    """
    runs: list[list[str]] = [[]]
    for text in overrides:
        override = parsed(text)
        variants = [text]
        if override.is_sweep_override():
            try:
                values = list(override.sweep_string_iterator())
            except (HydraException, ValueError, TypeError) as error:
                raise UserError(
                    f"{_name(text)}: {text!r} is no sweep ({_short(str(error))})"
                ) from None
            if not values:
                raise UserError(f"{_name(text)}: {text!r} sweeps over nothing; give it values")
            variants = [f"{override.get_key_element()}={_as_typed(value)}" for value in values]
        runs = [[*run, variant] for run in runs for variant in variants]
    return runs


def _as_typed(value: str) -> str:
    """1e9, which Hydra writes out as 1000000000.0, for names and lines."""
    if not re.fullmatch(r"\d{7,}\.0", value) or float(f"{float(value):g}") != float(value):
        return value
    return f"{float(value):g}".replace("e+0", "e").replace("e+", "e")


def unknown_key(key: str, keys: Collection[str]) -> str:
    """The line for a key that does not exist, with the nearest that does, or what replaced it."""
    if key in _REPLACED:
        return f"{key}: no such key any more; {_REPLACED[key]}"
    near = get_close_matches(key, sorted(keys), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{_name(key)}: no such key; {meant}`fp4pretrain train --cfg` prints all keys"


def one_line(error: Exception, overrides: Sequence[str], *, keys: Collection[str]) -> str:
    """What Hydra, OmegaConf or the YAML reader said, as one line that names key and cure."""
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark
        place = f"{Path(mark.name).resolve()}, line {mark.line + 1}" if mark else "a YAML file"
        return f"{place}: {error.problem}; correct the YAML"
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    told = [line for line in lines if not re.match(r"(full_key:|\w+_type=)", line)]
    reason = textwrap.shorten(told[-1] if told else type(cause).__name__, 160, placeholder=" ...")
    file = re.match(r"In '([^']+)'", str(error))
    place = f" (in {file[1]}.yaml)" if file else ""
    full_key = re.search(r"full_key: (\S+)", str(cause))
    cure = next((c for part, c in _CURES.items() if part in reason), "give another value")
    if full_key is None and file:
        return f"{file[1]}.yaml: {told[0]}; correct that file"
    if full_key is None:  # an interpolation of a whole section: OmegaConf does not say where
        suspects = [_name(text) for text in overrides if "${" in text] or map(_name, overrides)
        return f"{', '.join(suspects)}: {reason}; {cure}"
    if re.match(r"Key '.*' not in '", reason):
        return unknown_key(full_key[1], keys) + place
    return f"{full_key[1]}: {reason}{place}; {cure}"


def key_and_value(text: str) -> tuple[str, Any]:
    """What an override sets, and to what, as plain data. Raises UserError."""
    override = parsed(text)
    value = override.value()
    return override.key_or_group, value.text if isinstance(value, QuotedString) else value


def parsed(text: str) -> Override:
    """An override as Hydra reads it. Raises UserError where it cannot be read."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        value = text.partition("=")[2].strip("\"' ").replace("'", "")
        raise UserError(
            f"{_name(text)}: {_short(repr(text))} cannot be read; write key=value, and quotes "
            f"around a value of unusual characters: \"{_name(text)}='{_short(value)}'\""
        ) from None


def _check_options(group: str, value: Any, offered: Sequence[str]) -> None:
    if isinstance(value, dict):
        return  # sets keys of the group, which Hydra checks
    for option in value if isinstance(value, list) else [value]:
        if option is None and group in _MAY_BE_EMPTY:
            continue
        if option not in offered:
            known = offer(option, offered)
            given = "null" if option is None else repr(str(option))
            raise UserError(f"{group}: {given} is unknown; choose {known}")


def _name(text: str) -> str:
    """The key of an override for the head of a message, whatever was typed."""
    key = text.partition("=")[0].lstrip("+~")
    return key if re.fullmatch(r"[\w./@:]+", key) else repr(key or text)


def _short(text: str) -> str:
    """What was typed, as part of one line."""
    return "".join(c if c.isprintable() else " " for c in text[:100]) + "..." * (len(text) > 100)
