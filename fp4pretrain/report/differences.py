"""What differs between two configs, and whether their losses may be compared.

A gap is the recipe's doing only if the recipe is all that differs. Adam's eps alone (1e-8 or 1e-5)
has decided whether an FP4 run converged where every switch of its recipe did not; a seed, a batch
size or a data split does as much (several seeds are paired seed by seed: ``seeds.py``). So everything
counts but the keys below: the recipe itself, and what says how a run is named, logged and stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4pretrain.errors import UserError

RECIPE = ("precision",)
BOOKKEEPING = (
    "name",
    "run_dir",
    "resume",
    "resume_with",
    "baseline",
    "logging",
    "checkpoint",
    "guard",  # what it did is in the notes, run by run
    "train.tokens",  # has become train.steps
    "train.log_interval",
    "train.eval_interval",
    "train.eval_bf16",
    "data.cache_dir",
)
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """One key on which a run and its baseline differ, values as text."""

    run: str
    key: str
    baseline_value: str
    run_value: str

    @property
    def harmless(self) -> bool:
        """Whether the key is part of the recipe or of the bookkeeping."""
        return _within(self.key, RECIPE + BOOKKEEPING)

    @property
    def bookkeeping(self) -> bool:
        """Whether the key only names, logs or stores."""
        return _within(self.key, BOOKKEEPING)


def differences(
    run: str, config: Mapping[str, Any], baseline: Mapping[str, Any]
) -> list[Difference]:
    """All keys, dotted, on which the two configs differ, sorted."""
    ours, theirs = _flat(config), _flat(baseline)
    return [
        Difference(run, key, theirs.get(key, _ABSENT), ours.get(key, _ABSENT))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def refuse_unequal(found: list[Difference], *, baseline: str) -> None:
    """Raise ``UserError`` if a run differs from its baseline in more than the recipe."""
    harmful = [one for one in found if not one.harmless]
    if not harmful:
        return
    shown = ", ".join(
        f"{one.key} ({one.run_value} against {one.baseline_value})" for one in harmful[:4]
    )
    more = f" and {len(harmful) - 4} more" if len(harmful) > 4 else ""
    raise UserError(
        f"baseline: {harmful[0].run} differs from {baseline} in more than the recipe: "
        f"{shown}{more}; rerun one of them with equal settings, or compare with --force"
    )


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Leaves by dotted key. An empty mapping is a leaf, or it would equal an absent one."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: str(config)}
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
