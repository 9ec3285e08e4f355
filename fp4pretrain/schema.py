"""Frozen dataclasses as Hydra's schema."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, get_args, get_type_hints


def mutable(frozen: Any) -> type:
    """The same dataclass unfrozen: Hydra treats frozen ones as read-only, so no override could land.

    Nested dataclasses are mirrored too and tuples become lists, the YAML spelling.
    """
    fields: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(frozen)
    for f in dataclasses.fields(frozen):
        kind: Any = hints[f.name]
        if dataclasses.is_dataclass(kind):
            mirror = mutable(kind)
            fields.append((f.name, mirror, field(default_factory=mirror)))
        elif getattr(kind, "__origin__", None) is tuple:
            values = list(f.default) if f.default is not dataclasses.MISSING else []
            item = get_args(kind)[0]
            fields.append(
                (f.name, list.__class_getitem__(item), field(default_factory=values.copy))
            )
        else:
            fields.append((f.name, kind, field(default=f.default)))
    return dataclasses.make_dataclass(frozen.__name__ + "Config", fields)
