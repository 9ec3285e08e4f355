"""The loss gap at matched tokens.

A loss is only a loss at a number of tokens. So the baseline's curve is interpolated (linearly) onto
the tokens of the run's own rows, within the range that both cover, and only there are the two
subtracted. With the same seed both saw the same batches, so most of the noise of a batch cancels;
what is left is smoothed by a trailing mean over rows, of the run and of the baseline alike, before
the ratio is taken. Validation losses are exact and are not smoothed.

Relative gap = run / baseline - 1, as in arXiv 2509.25149 (figure 2), in per cent wherever shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4pretrain.report.load import Curve, FloatArray

WINDOW_LIMIT = 100


@dataclass(frozen=True)
class MatchedCurves:
    """Run and baseline on the same tokens [rows], both smoothed; never empty."""

    tokens: FloatArray
    run: FloatArray
    baseline: FloatArray

    @property
    def gap(self) -> FloatArray:
        """Relative gap [rows], 0.01 for 1%; NaN where either has diverged."""
        return self.run / self.baseline - 1


def match(run: Curve, baseline: Curve, *, window: int = 1) -> MatchedCurves | None:
    """Both curves on the run's tokens inside the common range; None where they have none."""
    if not len(run) or not len(baseline):
        return None
    inside = (run.tokens >= baseline.tokens[0]) & (run.tokens <= baseline.tokens[-1])
    if not inside.any():
        return None
    tokens = run.tokens[inside]
    return MatchedCurves(
        tokens,
        trailing_mean(run.values[inside], window),
        trailing_mean(np.interp(tokens, baseline.tokens, baseline.values), window),
    )


def trailing_mean(values: FloatArray, window: int) -> FloatArray:
    """Mean of each row and the rows before it: of the last tenth of the rows, at most ``window``.

    Early rows have a shorter window because the loss falls steeply there and a long one would lag
    behind it. A window with a non-finite row in it has no mean: NaN.
    """
    end = np.arange(1, len(values) + 1)
    start = end - np.clip(end // 10, 1, window)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    bad = np.concatenate([[0], np.cumsum(~finite)])
    means: FloatArray = (sums[end] - sums[start]) / (end - start)
    means[bad[end] > bad[start]] = np.nan
    return means


def smoothing_window(rows: int) -> int:
    """A tenth of the rows, at most 100: long enough to quiet batches, short against the decay."""
    return max(1, min(WINDOW_LIMIT, rows // 10))


def steady_rate(tokens_per_second: Curve) -> float | None:
    """Median of tokens a second without the first tenth of the rows (compilation, warm-up)."""
    if not len(tokens_per_second):
        return None
    first = min(max(1, len(tokens_per_second) // 10), len(tokens_per_second) - 1)
    return float(np.median(tokens_per_second.values[first:]))
