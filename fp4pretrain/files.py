"""Files as everybody here writes them: UTF-8 whatever the locale, and whole or not at all.

What is written lies beside its place under another name until it is complete, and is then renamed:
a full disk, a signal or an encoding error leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp4pretrain.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file to write, beside ``path`` and with its suffix; it takes ``path``'s place at the end.

    After an exception it is removed, and ``path`` is what it was. Raises OSError.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    beside = Path(name)
    try:
        os.chmod(beside, _mode(target))
        yield beside
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_text(path: str | Path, text: str, *, sync: bool = False) -> None:
    """Write ``text`` as UTF-8 in one go, its line ends as they are; ``sync``: past a power cut. Raises
    OSError."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(text.encode("utf-8"))
        if sync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path, *, key: str) -> Iterator[Path]:
    """A folder to fill, beside ``path``; at the end it is ``path``. After an exception it is gone.

    Raises UserError, with the option or config key ``key``, where ``path`` is there already, or cannot be
    written.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{key}: {path} exists already; remove it, or choose another folder")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent))
    except OSError as error:
        raise unwritable(key, path, error) from None
    try:
        yield beside
        beside.chmod(0o755)
        beside.rename(path)
    except OSError as error:
        raise unwritable(key, path, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def user_path(given: str | Path, *, key: str) -> Path:
    """A path as a user wrote it, ``~`` and ``~name`` replaced.

    Raises UserError where nobody has such a home folder: an unknown name, or no HOME in a container.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}: {given} names a home folder that is not there; write it out"
        ) from None


def user_cache() -> Path:
    """$XDG_CACHE_HOME/fp4pretrain, or ~/.cache/fp4pretrain; or one in the temporary folder where no home
    folder can be written."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named, "fp4pretrain")
    return _home_cache() / "fp4pretrain"


def unwritable(key: str, folder: Path, error: OSError) -> UserError:
    """The one line for a folder that cannot be written (permissions, a file in its place, full)."""
    reason = error.strerror or str(error)
    return UserError(f"{key}: cannot write in {folder} ({reason}); set {key} to a writable folder")


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced; of a new one what the umask leaves."""
    with contextlib.suppress(OSError):
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _home_cache() -> Path:
    """~/.cache; where no home folder can be written, as in a container that runs as an unknown user,
    a folder of this user's among the temporary ones."""
    try:
        home = Path.home()
        nearest = next(path for path in (home / ".cache", home, *home.parents) if path.exists())
        if os.access(nearest, os.W_OK | os.X_OK):
            return home / ".cache"
    except (RuntimeError, OSError):
        pass
    return Path(tempfile.gettempdir(), f"cache-of-{os.getuid()}")
