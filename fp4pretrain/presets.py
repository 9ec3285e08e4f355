"""Where the YAML presets are and what they are called. Light: ``--help`` needs nothing more."""

from __future__ import annotations

from pathlib import Path


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
