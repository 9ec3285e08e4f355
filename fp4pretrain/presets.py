"""Where the YAML presets are and what they are called: those that ship, and a user's own.

A folder of the user's (``--config-dir``) is laid out like ``configs/`` and is searched before it, for every
group. A single file (``precision=my/recipe.yaml``) is an option by its name; the other files of its
folder are options too, so that its ``defaults`` may name them. Both hold for the whole process.

Light: ``--help`` needs nothing more.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

from fp4pretrain.errors import UserError

_FEW = 12
SUFFIXES = (".yaml", ".yml")


def config_dir() -> Path:
    """The folder of YAML groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def launch_dir() -> Path:
    """The folder of torchrun.sh and slurm.sbatch: a part of the package."""
    return Path(__file__).resolve().parent / "launch"


class _Own:
    """The user's folders, and their single files as links below a folder of the process's own."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.files: dict[tuple[str, str], Path] = {}
        self._links: tempfile.TemporaryDirectory[str] | None = None

    @property
    def links(self) -> Path | None:
        return None if self._links is None else Path(self._links.name)

    def link(self, group: str, option: str, file: Path) -> None:
        if self._links is None:
            self._links = tempfile.TemporaryDirectory(prefix="fp4pretrain-")
        place = Path(self._links.name) / group / f"{option}.yaml"
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(file)
        self.files[group, option] = file


_own = _Own()


def use_folder(folder: Path) -> None:
    """Search a folder of the user's before the presets. Raises UserError where it holds no group."""
    known = groups()
    if not folder.is_dir():
        raise UserError(f"config-dir: {folder} is no folder; name one that has precision/NAME.yaml")
    if not any((folder / group).is_dir() for group in known):
        raise UserError(
            f"config-dir: {folder} holds none of the folders {', '.join(known)}; put a recipe into "
            f"{folder / 'precision'}"
        )
    if folder.absolute() not in _own.folders:
        _own.folders.insert(0, folder.absolute())


def use_file(group: str, file: Path) -> str:
    """Make a file of the user's an option of its group; returns the option's name.

    Raises UserError where there is no such file, and for a name that is taken or cannot be one.
    """
    option, file = file.stem, file.absolute()
    if not file.is_file():
        raise UserError(
            f"{group}: {file} is no file; give the path of a YAML file, or choose "
            f"{offer(option, groups()[group])}"
        )
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", option):
        raise UserError(
            f"{group}: {file.name} is no name for an option; rename it to letters and _"
        )
    taken = option_file(group, option)
    if taken is not None and not taken.samefile(file):
        raise UserError(
            f"{group}: {file} has the name of {group}={option}, which is there already; give the file "
            "another name"
        )
    if taken is None:
        _own.link(group, option, file)
    for neighbour in sorted(file.parent.iterdir()):
        is_preset = (
            neighbour.suffix in SUFFIXES and neighbour.is_file()
        )  # no editor's dangling lock
        if is_preset and option_file(group, neighbour.stem) is None:
            _own.link(group, neighbour.stem, neighbour)
    return option


def search_path() -> tuple[Path, ...]:
    """Folders of groups, the first that has an option counts."""
    links = () if _own.links is None else (_own.links,)
    return (*links, *_own.folders, config_dir())


def own() -> tuple[object, ...]:
    """The user's part of the search path: a key for caches of what was composed by it."""
    return (*_own.folders, *_own.files.items())


def option_file(group: str, option: str) -> Path | None:
    """The file of an option; None where there is none."""
    places = (folder / group / f"{option}.yaml" for folder in search_path())
    return next((place for place in places if place.is_file()), None)


def groups() -> dict[str, list[str]]:
    """Config group -> the options that there are. A user's folder adds options, never a group."""
    found = {}
    for folder in sorted(p for p in config_dir().iterdir() if p.is_dir()):
        places = [path / folder.name for path in search_path()]
        found[folder.name] = sorted({p.stem for place in places for p in place.glob("*.yaml")})
    return found


def offer(value: object, options: Collection[str]) -> str:
    """``options`` for a message: all of a few, of many those most like ``value``, and where all are."""
    if len(options) <= _FEW:
        return ", ".join(options)
    near = get_close_matches(str(value), options, n=5, cutoff=0.3) or sorted(options)[:5]
    usual = [name for name in ("bf16", "fp8", "nvfp4", "mxfp4_h16") if name in options]
    shown = list(dict.fromkeys([*near, *usual]))
    return f"{', '.join(shown)} or another of {len(options)} (fp4pretrain train --help)"
