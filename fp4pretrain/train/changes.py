"""Whether what goes on from a checkpoint is still the same experiment, and if not, in what it differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4pretrain import fingerprint
from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.precision import Progress

Changes = dict[str, tuple[Any, Any]]  # key -> (in the checkpoint, now)

# Keys of a run's length. They may change unnamed where the steps already done would have been the same.
_LENGTH = ("train.steps", "optim.warmup", "optim.decay")


def changes(
    path: Path,
    found: Mapping[str, Any],
    config: RunConfig,
    *,
    data: Mapping[str, Any] | None = None,
) -> Changes:
    """All that shapes the curve and differs between a checkpoint and the run that goes on from it.

    Args:
        path: the checkpoint, for messages.
        found: what its run.json says.
        config: the run's; ``resume_with`` names what may differ.
        data: the ``data`` of the run's fingerprint; None while it is not read yet.

    Raises:
        UserError: for a difference that is not named.
    """
    stored = found["fingerprint"]
    differing = fingerprint.differing(stored["entries"], fingerprint.entries(config))
    if stored["plan"] != fingerprint.plan_digest(config, plan_of(config)):
        recipe = fingerprint.differing(stored["precision"], fingerprint.recipe_entries(config))
        differing |= recipe or {"precision": (stored["plan"], "another plan")}
    if data is not None:
        differing |= fingerprint.differing(
            fingerprint.digests(stored["data"]), fingerprint.digests(data)
        )
    longer = _same_past(stored, config, step=found["step"])
    named = list(config.resume_with)
    if config.data.seed is None and ("seed" in named or "seed" in differing):
        named.append("data.seed")  # it is the run's seed: one name for both
    refused = [
        key
        for key in sorted(differing, key=lambda key: (key != "seed", key))
        if not (fingerprint.covered(key, named) or (longer and key in _LENGTH))
    ]
    if refused:
        raise UserError(_refusal(path, {key: differing[key] for key in refused}))
    return differing


def _refusal(path: Path, refused: Changes) -> str:
    was = ", ".join(f"{key}={_short(then)}" for key, (then, _) in refused.items())
    now = ", ".join(_short(now) for _, now in refused.values())
    why = ""
    if any(key in _LENGTH for key in refused):
        why = ", so that steps already done would have had another learning rate or recipe"
    names = dict.fromkeys("precision" if key.startswith("precision") else key for key in refused)
    return (
        f"resume_with: {path} was trained with {was}, and here it is {now}{why}; give the run what it "
        f"had, or go on with the change: resume_with=[{','.join(names)}]"
    )


def told(found: Changes) -> str:
    """The changes as one line."""
    return ", ".join(f"{key}: {_short(was)} -> {_short(now)}" for key, (was, now) in found.items())


def _same_past(stored: Mapping[str, Any], config: RunConfig, *, step: int) -> bool:
    """Whether the first ``step`` steps would have had the same learning rates and recipes."""
    then, now = stored["entries"], fingerprint.entries(config)
    if then["optim.warmup"] != now["optim.warmup"] or config.optim.schedule != "wsd":
        return False
    ends = [one["train.steps"] for one in (then, now)]
    stable = min(one["train.steps"] - one["optim.decay"] for one in (then, now))
    plan = plan_of(config)
    sequences = config.train.global_batch * config.model.seq_length
    # update n (from 0) has the full rate up to n = stable, and its recipe is that of progress n / steps
    start, last = Progress(), step - 1
    moments = [Progress(last, total, last * sequences) for total in ends]
    return step <= stable + 1 and not any(plan.switches(start, moment) for moment in moments)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
