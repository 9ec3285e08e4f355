"""Matching, smoothing and label placement against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4pretrain.report.gap import match, smoothing_window, steady_rate, trailing_mean
from fp4pretrain.report.load import Curve
from fp4pretrain.report.picture import spread


def _curve(tokens: np.ndarray, values: np.ndarray) -> Curve:
    return Curve(tokens.astype(float), values.astype(float))


def test_a_linear_loss_is_matched_exactly_between_the_baselines_rows() -> None:
    """Other batch sizes: rows at multiples of 30 against rows at multiples of 7."""
    run_tokens, base_tokens = np.arange(30, 1000, 30), np.arange(7, 990, 7)
    run = _curve(run_tokens, 1.02 * (10 - run_tokens / 200))
    baseline = _curve(base_tokens, 10 - base_tokens / 200)
    matched = match(run, baseline)
    assert matched is not None
    assert matched.tokens[0] == 30
    assert matched.tokens[-1] == 960  # 990 is past the baseline's last row, 987
    np.testing.assert_allclose(matched.gap, 0.02, rtol=1e-12)


@pytest.mark.parametrize("window", [1, 5, 50])
def test_a_proportional_loss_has_that_gap_under_any_smoothing(window: int) -> None:
    tokens = np.arange(1, 501)
    noise = np.random.default_rng(0).normal(size=500)
    baseline = _curve(tokens, 3 + 0.2 * noise)
    matched = match(_curve(tokens, 1.015 * baseline.values), baseline, window=window)
    assert matched is not None
    np.testing.assert_allclose(matched.gap, 0.015, rtol=1e-9)


def test_runs_without_common_tokens_do_not_match() -> None:
    first, second = np.arange(1, 10), np.arange(20, 30)
    assert match(_curve(first, first), _curve(second, second)) is None
    assert match(_curve(first, first), _curve(first[:0], first[:0])) is None


def test_the_last_mean_is_of_the_last_window_rows() -> None:
    values = np.random.default_rng(1).normal(size=300)
    assert trailing_mean(values, 30)[-1] == pytest.approx(values[-30:].mean(), abs=1e-12)


def test_early_rows_have_a_shorter_window_so_that_the_mean_does_not_lag() -> None:
    values = np.arange(300.0)
    lag = values - trailing_mean(values, 30)
    assert lag[0] == lag[18] == 0
    assert lag[99] == pytest.approx(4.5)  # a window of 10
    assert lag[299] == pytest.approx(14.5)  # the full window of 30


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_divergence_spoils_the_windows_that_hold_it_and_no_others(bad: float) -> None:
    values = np.ones(400)
    values[200] = bad
    means = trailing_mean(values, 10)
    assert np.isnan(means[200:210]).all()
    np.testing.assert_allclose(np.delete(means, np.arange(200, 210)), 1.0)


@pytest.mark.parametrize(
    ("rows", "window"), [(1, 1), (9, 1), (20, 2), (200, 20), (1000, 100), (10**6, 100)]
)
def test_the_window_is_a_tenth_of_the_rows_at_most_100(rows: int, window: int) -> None:
    assert smoothing_window(rows) == window


@pytest.mark.parametrize(
    ("rates", "steady"),
    [
        ([], None),
        ([5.0], 5.0),
        ([1.0, 9.0], 9.0),
        ([1.0, 1.0] + [8.0, 9.0, 10.0] * 6, 9.0),
    ],
)
def test_the_steady_rate_leaves_the_first_rows_out(
    rates: list[float], steady: float | None
) -> None:
    assert steady_rate(_curve(np.arange(len(rates)), np.array(rates))) == steady


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15).map(sorted))
def test_labels_lie_apart_inside_the_panel_and_in_order(heights: list[float]) -> None:
    placed = spread(heights, step=0.06)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    assert all(b - a >= 0.06 - 1e-9 for a, b in pairwise(placed))


def test_labels_that_are_apart_stay_and_two_that_meet_part_evenly() -> None:
    assert spread([0.2, 0.5, 0.9], step=0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert spread([0.5, 0.5], step=0.1) == pytest.approx([0.45, 0.55])
