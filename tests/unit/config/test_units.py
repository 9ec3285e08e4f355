"""Amounts as people write them, and keys that were replaced."""

from __future__ import annotations

from typing import Any

import pytest

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.units import steps_of, tokens_of


@pytest.mark.parametrize(
    ("value", "tokens"),
    [(7, 7), ("7", 7), (2e6, 2_000_000), ("2M", 2_000_000), ("1.5B", 1_500_000_000), ("3K", 3000)],
)
def test_tokens(value: Any, tokens: int) -> None:
    assert tokens_of(value, key="k") == tokens


@pytest.mark.parametrize("value", [0, -5, "2m", "M", "1e6", True, None, "", "2 M", float("nan")])
def test_what_is_no_number_of_tokens(value: Any) -> None:
    with pytest.raises(UserError, match="^k: .* is no number of tokens; write"):
        tokens_of(value, key="k")


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0, 0), (0.1, 20), (0.999, 200), (1, 1), (1.0, 1), (150, 150), ("2K", 20), ("0.1K", 1)],
)
def test_steps_are_a_fraction_steps_or_tokens(value: Any, steps: int) -> None:
    assert steps_of(value, steps=200, tokens_a_step=100, key="k") == steps


@pytest.mark.parametrize("value", [-1, 1.5, "2m", "0.1", True, None, float("inf"), float("nan")])
def test_what_is_no_part_of_a_run(value: Any) -> None:
    with pytest.raises(UserError, match="^k: .* is neither a fraction of the run"):
        steps_of(value, steps=200, tokens_a_step=100, key="k")


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("train.eval_batches=4", "data.valid_tokens"),
        ("checkpoint.allow_recipe_change=true", r"resume_with=\[precision\]"),
    ],
)
def test_a_key_that_is_gone_names_its_successor(override: str, cure: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}: no such key any more; .*{cure}"):
        compose([override])
