"""Resume goes on with the same experiment, or with the differences that were asked for by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fp4pretrain import fingerprint
from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.train.changes import changes, told

BASE = ["train.steps=200", "optim.warmup=20", "optim.decay=40", "data=mock"]


def data(order: str = "o", valid: str = "v") -> dict[str, Any]:
    sets = {"validation": {"digest": valid, "tokens": 8, "sequences": 1}}
    return {fingerprint.ORDER: order, fingerprint.VALIDATION: sets}


def stored(*overrides: str, step: int = 100) -> dict[str, Any]:
    """What run.json says of a checkpoint of this run."""
    config = compose([*BASE, *overrides])
    whole = fingerprint.whole(config, plan_of(config), data())
    return json.loads(json.dumps({"step": step, "fingerprint": whole}))


def resumed(*overrides: str, step: int = 100, **now: Any) -> dict[str, Any]:
    return changes(Path("ckpt"), stored(step=step), compose([*BASE, *overrides]), data=data(**now))


def test_the_same_run_goes_on_without_a_word() -> None:
    assert resumed() == {}
    assert (
        resumed("guard.max_rollbacks=9", "parallel.tensor=2", "precision.backend=reference") == {}
    )
    assert resumed("train.eval_interval=7", "run_dir=moved", "precision.name=x") == {}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=5", "seed"),
        ("data.seed=5", "data.seed"),
        ("optim.lr=5e-4", "optim.lr"),
        ("optim.eps=1e-5", "optim.eps"),
        ("optim.decay=60", "optim.decay"),
        ("optim.warmup=30", "optim.warmup"),
        ("train.global_batch=8", "train.global_batch"),
        ("train.micro_batch=2", "train.micro_batch"),
        ("precision=fp8", "precision"),
        ("precision.keep.last_blocks=2", "precision"),
    ],
)
def test_a_difference_is_refused_or_named(override: str, key: str) -> None:
    if key == "optim.decay":  # the stable part is the same: see below
        with pytest.raises(UserError, match="optim.decay=40, and here it is 60, so that steps"):
            resumed(override, step=190)
        return
    with pytest.raises(UserError, match=rf"^resume_with: ckpt was trained with {key}") as caught:
        resumed(override)
    named = re.search(r"resume_with=\[([\w.]+)\]$", str(caught.value))
    assert named is not None
    assert named[1] == key
    found = resumed(override, f"resume_with=[{key}]")
    assert any(one.startswith(key) for one in found)
    assert f"{next(iter(found))}: " in told(found)
    assert resumed(override, f"resume_with=[{key.split('.')[0]}]") == found


def test_the_text_and_what_validates_are_compared_by_content() -> None:
    assert resumed("data.cache_dir=elsewhere") == {}
    for changed, key in (({"order": "other"}, "data.order"), ({"valid": "w"}, "data.validation")):
        with pytest.raises(UserError, match=f"was trained with {key}"):
            resumed(**changed)
        for name in (key, "data.path", "data"):
            assert list(resumed(f"resume_with=[{name}]", **changed)) == [key]
    with pytest.raises(UserError, match="data.order"):
        resumed("resume_with=[data.valid_tokens]", order="other")


@pytest.mark.parametrize(
    ("overrides", "step", "free"),
    [
        (["train.steps=400"], 161, True),  # update 160 has the full rate under both
        (["train.steps=400"], 162, False),
        (["train.steps=400", "optim.decay=300"], 101, True),
        (["train.steps=400", "optim.decay=300"], 102, False),
        (["train.steps=150"], 111, True),
        (["train.steps=150"], 112, False),
        (["train.steps=400", "optim.warmup=0.1"], 100, False),  # 40 steps in place of 20
        (["train.steps=400", "optim.warmup=0.05"], 100, True),  # 20 steps
        (["optim.decay=60"], 100, True),
        (["train.steps=400", "optim=cosine"], 100, False),
    ],
)
def test_a_run_may_become_longer_while_its_past_stays(
    overrides: list[str], step: int, free: bool
) -> None:
    """Held to the schedule itself: the learning rates of all steps that are done."""
    if free:
        found = resumed(*overrides, step=step)
        assert found
        assert set(found) <= {"train.steps", "optim.warmup", "optim.decay"}
    else:
        with pytest.raises(UserError, match="^resume_with: "):
            resumed(*overrides, step=step)


def test_a_late_switch_that_would_have_been_earlier_is_another_past() -> None:
    late = ["precision.tail.at=0.5"]
    longer = compose([*BASE, *late, "train.steps=400"])
    shorter = compose([*BASE, *late, "train.steps=170"])
    assert changes(Path("ckpt"), stored(*late, step=100), longer)
    with pytest.raises(UserError, match="another learning rate or recipe"):
        changes(Path("ckpt"), stored(*late, step=101), longer)
    assert changes(Path("ckpt"), stored(*late, step=85), shorter)
    with pytest.raises(UserError, match="another learning rate or recipe"):
        changes(Path("ckpt"), stored(*late, step=86), shorter)
