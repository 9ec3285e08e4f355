"""What differs between two runs, and whether their losses may be compared.

A gap is the recipe's doing only if the recipe is all that differs. Adam's eps alone (1e-8 or 1e-5)
has decided whether an FP4 run converged where every switch of its recipe did not; a batch size or a
data split does as much. So everything counts but the recipe itself and what shapes no curve
(``fingerprint.HARMLESS``). Text counts by its content where a run left the digests. Seeds make
pairs (``seeds.py``), and are no settings here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import BY_CONTENT, HARMLESS, ORDER, VALIDATION, within
from fp4pretrain.naming import flat
from fp4pretrain.report.load import Run
from fp4pretrain.stored import defaults

SEEDS = ("seed", "data.seed", "train.sum_order")
RATE = "optim.lr"
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
        """Whether the key is part of the recipe."""
        return within(self.key, ("precision",))


# By run, for as long as the run is in use: a comparison asks for a run's settings once for every other run.
_settings: WeakKeyDictionary[Run, dict[str, str]] = WeakKeyDictionary()


def settings(run: Run) -> Mapping[str, str]:
    """Key -> value, as text, of all that shapes a run's curve but its seeds. Keys that came after the run
    have their defaults, as where its config is read to go on."""
    if run not in _settings:
        _settings[run] = _settings_of(run)
    return _settings[run]


def _settings_of(run: Run) -> dict[str, str]:
    leaves = defaults() | flat(run.config)
    if run.fingerprint is not None:
        by_content = {key for keys in BY_CONTENT.values() for key in keys}
        leaves = {key: value for key, value in leaves.items() if not within(key, by_content)}
        leaves |= run.fingerprint["entries"] | {VALIDATION: validation(run)}
    return {
        key: str(value)
        for key, value in leaves.items()
        if not within(key, (*HARMLESS, "resume_with")) and key not in SEEDS
    }


def validation(run: Run) -> str | None:
    """Digests of the run's validation sets; None where it left none."""
    if run.fingerprint is None:
        return None
    sets = run.fingerprint["data"][VALIDATION]
    return ", ".join(f"{name} {one['digest'][:12]}" for name, one in sets.items())


def same_recipe(run: Run, other: Run) -> bool:
    """Whether the two compute the same, whatever that is called."""
    if run.fingerprint is not None and other.fingerprint is not None:
        return bool(run.fingerprint["plan"] == other.fingerprint["plan"])
    ours, theirs = (
        {key: value for key, value in settings(one).items() if within(key, ("precision",))}
        for one in (run, other)
    )
    return ours == theirs


def differences(run: Run, baseline: Run) -> list[Difference]:
    """All keys on which the two differ, seeds left out, sorted."""
    ours, theirs = settings(run), settings(baseline)
    equal_plans = same_recipe(run, baseline)
    return [
        Difference(run.name, key, theirs.get(key, _ABSENT), ours.get(key, _ABSENT))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not (equal_plans and within(key, ("precision",)))
    ]


def order_difference(run: Run, baseline: Run) -> list[Difference]:
    """Whether two runs of one seed read other text, or in another order."""
    if run.fingerprint is None or baseline.fingerprint is None:
        return []
    ours, theirs = (one.fingerprint["data"][ORDER] for one in (run, baseline))  # type: ignore[index]
    return [] if ours == theirs else [Difference(run.name, ORDER, theirs, ours)]


def refuse_unequal(found: Sequence[Difference], *, baseline: str) -> None:
    """Raise ``UserError`` if a run differs from its baseline in more than the recipe."""
    harmful = [one for one in found if not one.harmless]
    if not harmful:
        return
    shown = ", ".join(
        f"{one.key} ({one.run_value} against {one.baseline_value})" for one in harmful[:4]
    )
    more = f" and {len(harmful) - 4} more" if len(harmful) > 4 else ""
    if any(one.key == VALIDATION for one in harmful):
        raise UserError(
            f"baseline: {harmful[0].run} and {baseline} have different validation sets ({shown}{more}): "
            "their losses are of other text; rerun one of them with equal data keys"
        )
    raise UserError(
        f"baseline: {harmful[0].run} differs from {baseline} in more than the recipe: "
        f"{shown}{more}; rerun one of them with equal settings, or compare with --force"
    )


def refuse_changed(runs: Sequence[Run]) -> None:
    """Raise ``UserError`` for a run that was resumed with more changed than its recipe."""
    for run in runs:
        told = [f"{k}: {v}" for k, v in run.changes.items() if not within(k, ("precision",))]
        if told:
            raise UserError(
                f"{run.path}: it was resumed as another experiment ({', '.join(told[:3])}), so its "
                "curve is of no one setting; leave it out, or compare with --force"
            )
