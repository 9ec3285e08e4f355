"""Where the YAML presets are and what they are called. Light: ``--help`` needs nothing more."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

_FEW = 12


def config_dir() -> Path:
    """The folder of YAML groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def groups() -> dict[str, list[str]]:
    """Config group -> the options that its folder offers."""
    found = {}
    for folder in sorted(p for p in config_dir().iterdir() if p.is_dir()):
        found[folder.name] = sorted(p.stem for p in folder.glob("*.yaml"))
    return found


def offer(value: object, options: Collection[str]) -> str:
    """``options`` for a message: all of a few, of many those most like ``value``, and where all are."""
    if len(options) <= _FEW:
        return ", ".join(options)
    near = get_close_matches(str(value), options, n=5, cutoff=0.3) or sorted(options)[:5]
    usual = [name for name in ("bf16", "fp8", "nvfp4", "mxfp4_h16") if name in options]
    shown = list(dict.fromkeys([*near, *usual]))
    return f"{', '.join(shown)} or another of {len(options)} (fp4pretrain train --help)"
