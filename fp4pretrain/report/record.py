"""A comparison as JSON: fractions, not per cents; null where there is no number."""

from __future__ import annotations

import math
from typing import Any

from fp4pretrain.report.comparison import ENDPOINTS, Comparison, Result
from fp4pretrain.report.endpoint import Gap
from fp4pretrain.report.notes import notes
from fp4pretrain.report.student import LEVEL, Interval


def as_json(comparison: Comparison) -> dict[str, Any]:
    """``gap``, ``low``, ``high`` of a result are of the validation loss, relative; every endpoint is in
    ``endpoints``. ``tokens_to_equal_loss``: extra tokens as a fraction, 0.08 for 8% more."""
    base = comparison.baseline
    return {
        "baseline": base.name,
        "baseline_seeds": list(base.seeds),
        "baseline_losses": {key: _number(loss) for key, loss in base.losses.items()},
        "level": LEVEL,
        "results": [_result(one, comparison) for one in comparison.results[1:]],
        "notes": notes(comparison),
    }


def _result(result: Result, comparison: Comparison) -> dict[str, Any]:
    gap, equal = result.gap, result.equal_loss
    assert gap is not None, "every result but the baseline's has one"
    tuning = comparison.tuning.get(result.run.name)
    return {
        "name": result.name,
        "seeds": list(result.seeds),
        **_gap(gap),
        "tokens_to_equal_loss": None if equal is None else _number(equal.extra),
        **_ends(None if equal is None else equal.interval, "tokens_to_equal_loss_"),
        "tokens": result.tokens,
        "diverged": list(result.diverged),
        "learning_rates": None
        if tuning is None
        else {
            "rates": tuning.rates,
            "losses": [_number(loss) for loss in tuning.losses],
            "best": tuning.best,
            "edge": tuning.edge,
            "lowest": tuning.lowest,
        },
        "endpoints": {key: _gap(result.gaps[key]) for key in ENDPOINTS if key in result.gaps},
        "tokens_per_second": result.tokens_per_second,
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "gap": _number(gap.gap),
        **_ends(gap.relative),
        "verdict": gap.verdict,
        "interval": gap.source,
        "loss": _number(gap.loss),
        "nats": _number(gap.nats),
        **_ends(gap.absolute, "nats_"),
        "pairs": [_number(one) for one in gap.pairs],
        "more_seeds": gap.more_seeds,
    }


def _ends(found: Interval | None, prefix: str = "") -> dict[str, float | None]:
    low, high = (None, None) if found is None else (found.low, found.high)
    return {f"{prefix}low": _number(low), f"{prefix}high": _number(high)}


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)
