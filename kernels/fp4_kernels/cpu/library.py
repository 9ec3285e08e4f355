"""The C++ casts as a library: found in the cache, or compiled into it, and loaded with ctypes.

Compiling takes seconds, once for each user, CPU, compiler and version of the source: the library's name
is a hash of them. Processes that start together wait for the one that compiles. The compiler writes into
a temporary file, which is renamed when it is whole. The library uses all instructions of the CPU at hand,
so none is shipped compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("casts.cpp")
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
COMPILERS = ("g++", "clang++", "c++")
# Without contraction a product and a sum round twice, as they do in PyTorch. The others change no value.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_LIMIT = 120.0  # seconds to compile, or to wait for another process that does


class Unavailable(Exception):
    """Why there is no library here, in one clause."""


class CastSpec(ctypes.Structure):
    """``CastSpec`` of casts.cpp, field by field."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in (
            "scales", "rule", "rounding", "span", "eden", "coded", "emin", "emax", "mantissa",
        )],
        *[(name, ctypes.c_float) for name in ("max", "outer_max", "inverse_max", "stretch", "alpha")],
        *[(name, ctypes.c_int64) for name in (
            "block_rows", "block_cols", "outer_rows", "outer_cols", "group",
        )],
    ]  # fmt: skip


class NoiseSpec(ctypes.Structure):
    """``NoiseSpec`` of casts.cpp, field by field."""

    _fields_ = [
        ("key", ctypes.c_uint64),
        *[(name, ctypes.c_int64) for name in (
            "row_offset", "col_offset", "row_part", "row_gap", "col_part", "col_gap",
        )],
    ]  # fmt: skip


def load(folder: Path) -> ctypes.CDLL:
    """The library, from ``folder`` or compiled into it.

    Raises:
        Unavailable: without a compiler, where it fails, or where the folder cannot be used.
    """
    compiler = _compiler()
    command = [compiler, *FLAGS, _native_flag(), "-shared", "-pthread"]
    path = folder / f"casts-{_identity(command)}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with _alone(path.with_suffix(".lock")):
                if not path.exists():
                    _compile(command, path)
        if path.stat().st_uid != os.getuid():
            raise Unavailable(f"{path} belongs to another user")
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"its library cannot be loaded from {folder}: {error}") from None
    return _declared(library)


def _compiler() -> str:
    """The full path of $CXX, else of the first compiler that is there."""
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    missing = f"CXX={named} is not there" if named else f"none of {', '.join(COMPILERS)} is there"
    raise Unavailable(f"{missing}: install a C++ compiler, or name one in CXX")


def _native_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _identity(command: list[str]) -> str:
    """What the library's bits depend on, as a short hash."""
    compiler = os.stat(os.path.realpath(command[0]))
    parts = [
        *command,
        compiler.st_size,
        compiler.st_mtime_ns,
        os.getuid(),
        platform.machine(),
        _cpu(),
    ]
    text = "\n".join(map(str, parts)).encode()
    sources = [file.read_bytes() for file in (SOURCE, *HEADERS)]
    return hashlib.sha256(b"".join(sources) + text).hexdigest()[:24]


def _cpu() -> str:
    """The model of the CPU and its instructions: a cache may lie on a disk that machines share."""
    wanted = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    return platform.processor()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, where the disk can lock; elsewhere each compiles for itself."""
    import fcntl

    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _compile(command: list[str], path: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT,
            check=False,
        )
        if done.returncode:
            said = next((x for x in done.stderr.splitlines() if "error" in x), "no word")
            raise Unavailable(f"{command[0]} failed: {' '.join(said.split())[:160]}")
        os.replace(name, path)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {_LIMIT:.0f} seconds") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.fp4_orient.argtypes = [
        pointer, number, long, long, long, long, pointer, long, number, pointer, ctypes.c_float,
        number, number, pointer, number,
    ]  # fmt: skip
    library.fp4_cast.argtypes = [
        pointer, long, long, pointer, pointer, pointer, pointer, number,
    ]  # fmt: skip
    for function in (library.fp4_orient, library.fp4_cast):
        function.restype = number
    return library
