"""Which code and which libraries a run was made with."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fp4pretrain import __version__

_LIBRARIES = ("torch", "megatron-core", "triton", "numpy", "tokenizers", "transformer-engine")
_SOURCES = (".py", ".cpp", ".h")
_PACKAGE = Path(__file__).resolve().parent


@cache
def sources_digest() -> str:
    """A digest of all Python and C++ files of fp4pretrain and its kernels: equal code has an equal digest."""
    folders = [_PACKAGE, *(p for p in (_PACKAGE.parent / "kernels/fp4_kernels",) if p.is_dir())]
    if len(folders) == 1:  # installed: the kernels lie beside the package
        folders.append(_PACKAGE.parent / "fp4_kernels")
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES):
            found.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str | None:
    """The git commit of a checkout, with ``+changes`` where files differ from it; None elsewhere."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def versions() -> dict[str, str]:
    """Versions of fp4pretrain, Python and the installed libraries that compute."""
    found = {"fp4pretrain": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    if not (_PACKAGE.parent / ".git").exists():
        raise FileNotFoundError(".git")  # a package inside some other project's checkout
    done = subprocess.run(
        ["git", "-C", str(_PACKAGE.parent), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
