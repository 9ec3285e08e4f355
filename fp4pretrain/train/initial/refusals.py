"""The one-line errors for a folder that no run can begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4pretrain.errors import UserError


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"init: {folder} is damaged ({what}); copy it again")


def another_model(folder: Path, wanted: Mapping[str, Any]) -> UserError:
    """``wanted``: keys of the model section with the values that the folder's model has."""
    sets = " ".join(f"model.{name}={_word(value)}" for name, value in wanted.items())
    return UserError(f"init: {folder} is another model than the run's; set {sets}")


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value) and value >= 1:
        return str(int(value))
    return str(value)
