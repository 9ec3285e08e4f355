"""When the guard calls a step bad, a spike a spike, and the last good step good."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp4pretrain.config import GuardConfig, SpikeConfig
from fp4pretrain.errors import UserError
from fp4pretrain.train.guard.decisions import (
    GuardMemory,
    LossTrack,
    follow,
    not_finite,
    observe,
    trouble,
)
from fp4pretrain.train.guard.rollback import Entry, entries, entry_for, record

RULE = SpikeConfig(action="rollback", threshold=7.0, window=20, warmup=10, patience=3)
SETTINGS = GuardConfig(max_skipped=3, spike=RULE)
NAN, INF = math.nan, math.inf


def _row(step: int, loss: float, grad_norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": grad_norm}


def _noise(count: int, *, start: float = 4.0, fall: float = 0.01) -> list[float]:
    """A falling curve with batch noise of 0.05."""
    rng = random.Random(3)
    return [start - fall * i + rng.gauss(0, 0.05) for i in range(count)]


def _troubles(losses: list[float], settings: GuardConfig = SETTINGS) -> list[str | None]:
    memory, found = GuardMemory(), []
    for step, loss in enumerate(losses, start=1):
        memory = observe(memory, _row(step, loss), settings)
        found.append(trouble(memory, settings))
    return found


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (4.0, 1.0, None),
        (NAN, 1.0, "loss"),
        (4.0, INF, "grad_norm"),
        (-INF, NAN, "loss and grad_norm"),
    ],
)
def test_a_step_is_bad_where_one_of_its_numbers_is(
    loss: float, grad_norm: float, reason: str | None
) -> None:
    assert not_finite(_row(1, loss, grad_norm)) == reason


def test_the_track_is_mean_and_variance_of_what_it_has_seen() -> None:
    losses = _noise(10)
    track = LossTrack()
    for loss in losses:
        track = follow(track, loss, RULE)
    mean = sum(losses) / 10
    assert track.mean == pytest.approx(mean, rel=1e-12)
    assert track.variance == pytest.approx(sum((x - mean) ** 2 for x in losses) / 10, rel=1e-9)


def test_the_track_forgets_at_the_pace_of_its_window() -> None:
    """After a step of the level, what is left of the old one is (1 - 2 / (window + 1))^n."""
    track = LossTrack(seen=1000, mean=4.0, variance=1.0)
    for _ in range(30):
        track = follow(track, 3.0, RULE)
    assert track.mean == pytest.approx(3 + (1 - 2 / 21) ** 30, rel=1e-12)


SPIKE = 6.0
CURVES = {
    "noise": (_noise(200), None),
    "a fall": (_noise(50) + _noise(50, start=2.0), None),
    "one outlier": ([*_noise(50), SPIKE, *_noise(50, start=3.5)], None),
    "two, patience is three": ([*_noise(50), SPIKE, SPIKE, *_noise(50, start=3.5)], None),
    "three": ([*_noise(50), SPIKE, SPIKE, SPIKE], 53),
    "while it learns": ([*_noise(5), SPIKE, SPIKE, SPIKE, *_noise(50)], None),
    "growing": ([*_noise(50), SPIKE, SPIKE + 1, SPIKE + 2], 53),
    "a slow rise, which the track follows": (_noise(50) + [3.5 + 0.1 * i for i in range(20)], None),
    "a NaN between": ([*_noise(50), SPIKE, SPIKE, NAN, SPIKE], 54),
}


@pytest.mark.parametrize("name", CURVES)
def test_spikes(name: str) -> None:
    losses, step = CURVES[name]
    found = _troubles(losses)
    assert [i for i, what in enumerate(found, start=1) if what][:1] == ([step] if step else [])
    assert set(found) <= {None, "spike"}


def test_a_spike_does_not_raise_its_own_limit() -> None:
    track = LossTrack(seen=50, mean=4.0, variance=0.01)
    for n in range(1, 100):
        track = follow(track, SPIKE, RULE)
        assert track == LossTrack(seen=50, mean=4.0, variance=0.01, above=n)


def test_nothing_is_a_spike_to_a_rule_that_is_off() -> None:
    settings = replace(SETTINGS, spike=replace(RULE, action="none"))
    assert not any(_troubles(CURVES["three"][0], settings))


@pytest.mark.parametrize(
    ("losses", "limit", "step"),
    [
        ([4, NAN, NAN, NAN], 3, 4),
        ([4, NAN, NAN, 4, NAN, NAN, 4], 3, None),
        ([NAN] * 9, 0, None),
        ([INF], 1, 1),
    ],
)
def test_bad_steps_count_in_a_row(losses: list[float], limit: int, step: int | None) -> None:
    found = _troubles(losses, replace(SETTINGS, max_skipped=limit))
    assert [i for i, what in enumerate(found, start=1) if what][:1] == ([step] if step else [])


@pytest.mark.parametrize(
    ("tail", "good"),
    [([], 50), ([NAN, NAN], 50), ([SPIKE, SPIKE], 50), ([SPIKE, NAN], 50), ([SPIKE, 3.5], 52)],
)
def test_the_good_step_is_the_last_one_before_the_trouble(tail: list[float], good: int) -> None:
    memory = GuardMemory()
    for step, loss in enumerate([*_noise(50), *tail], start=1):
        memory = observe(memory, _row(step, loss), SETTINGS)
    assert memory.good_step == good


def test_a_memory_that_was_stored_decides_the_same() -> None:
    """Through JSON after every step, as by a checkpoint: the same bits."""
    memory = kept = GuardMemory()
    for step, loss in enumerate(CURVES["a NaN between"][0], start=1):
        memory = observe(memory, _row(step, loss), SETTINGS)
        kept = GuardMemory.restored(json.loads(json.dumps(kept.stored())))
        kept = observe(kept, _row(step, loss), SETTINGS)
    assert kept == memory


def _entry(rollbacks: int, to_step: int) -> Entry:
    return Entry(rollbacks, to_step + 7, to_step, 100 * rollbacks, 10, {"rollbacks": rollbacks})


def test_an_entry_is_for_the_checkpoint_it_went_back_to_and_for_whoever_missed_it(
    tmp_path: Path,
) -> None:
    assert entry_for(tmp_path, step=4, rollbacks=0) is None
    for entry in (_entry(1, 4), _entry(2, 8), _entry(3, 8)):
        record(tmp_path, entry)
    assert entry_for(tmp_path, step=4, rollbacks=0) == _entry(1, 4)
    assert entry_for(tmp_path, step=8, rollbacks=1) == _entry(3, 8)
    assert entry_for(tmp_path, step=8, rollbacks=3) is None
    assert entry_for(tmp_path, step=12, rollbacks=0) is None
    # resumed from before the second one, the run goes back again and replaces what came after
    record(tmp_path, _entry(2, 6))
    assert entries(tmp_path) == [_entry(1, 4), _entry(2, 6)]
    assert [p.name for p in tmp_path.iterdir()] == ["rollbacks.json"]


@pytest.mark.parametrize("text", ["", "[", "[3]", '[{"rollbacks": 1}]', "3"])
def test_a_damaged_record_of_rollbacks_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(UserError, match=r"^resume: .*rollbacks\.json is damaged .*remove it"):
        entry_for(tmp_path, step=1, rollbacks=0)
