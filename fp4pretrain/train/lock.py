"""One run folder, one process: a lock that the kernel lets go of when its holder dies.

``runs/NAME/.lock`` is held by ``flock``, so on one machine a dead holder never stands in the way. A shared
file system may keep flock to each machine. So the file also says who holds it, and the holder renews its time
every few seconds: another machine that finds a holder watches that time before it takes over. No clock
of one machine is compared with another's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from fp4pretrain.errors import UserError

_NAME = ".lock"
_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 20.0  # without one a holder on another machine is taken for dead
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class RunLock:
    """The lock of the run folder ``path``, for the main rank. ``acquire`` raises UserError where another
    process holds it."""

    def __init__(self, path: Path, *, beat: float = _BEAT, silence: float = _SILENCE) -> None:
        self._file = path / _NAME
        self._beat, self._silence = beat, silence
        self._token = uuid.uuid4().hex
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take it, making the folder where there is none."""
        try:
            descriptor, alone = self._open()
        except OSError as error:
            raise UserError(
                f"run_dir: {self._file.parent} cannot be written ({error.strerror}); choose another "
                "run_dir"
            ) from None
        holder = _read(descriptor)
        if not alone or (holder is not None and self._lives(holder)):
            os.close(descriptor)
            raise UserError(_taken(self._file.parent, holder))
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        text = json.dumps(mine | {"since": round(time.time()), "token": self._token})
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go, if it was taken; the folder goes too where nothing else came into it."""
        if self._descriptor is None:
            return
        self._released.set()
        assert self._thread is not None
        self._thread.join()
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with suppress(OSError):  # not empty, or another that came and went has removed it
            self._file.parent.rmdir()

    def _open(self) -> tuple[int, bool]:
        """The open file, and whether no process of this machine holds it."""
        while True:
            folder = self._file.parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileExistsError, FileNotFoundError):
                if os.path.lexists(folder) and not folder.is_dir():
                    raise
                continue  # a holder that made the folder has removed it in between
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return descriptor, False
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    os.close(descriptor)
                    raise
            try:
                if os.stat(self._file).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor, True
            except FileNotFoundError:
                pass
            os.close(descriptor)  # its holder removed it in between

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Whether a holder that this machine's flock knows nothing of gives signs of life."""
        if holder.get("machine") == _machine():
            return False  # flock was free: it is dead
        first, deadline = self._time(), time.monotonic() + self._silence
        while time.monotonic() < deadline:
            time.sleep(self._silence / 20)
            if self._time() != first:
                return True
        return False

    def _time(self) -> int:
        """When the holder last renewed the file's time. The file is opened anew, so that NFS asks its
        server."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY)
        except FileNotFoundError:
            return -1
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def _live(self) -> None:
        assert self._descriptor is not None
        while not self._released.wait(self._beat):
            try:
                os.utime(self._descriptor)
                holder = _read(self._descriptor)
            except OSError:
                continue  # a file system that is away for a while
            if holder is not None and holder.get("token") != self._token:
                # this process stood still so long that another machine took the folder
                line = _taken(self._file.parent, holder)
                print(f"fp4pretrain: {line}", file=sys.stderr, flush=True)
                os._exit(1)


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty: nobody holds it
        return None
    return found if isinstance(found, dict) else None


def _machine() -> str:
    """A name for the running kernel, whose processes share locks; it changes when the machine restarts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _taken(folder: Path, holder: dict[str, Any] | None) -> str:
    who = "another process"
    if holder is not None:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.get("since", 0)))
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {since}"
    return (
        f"run_dir: {folder} is being trained by {who}; wait for it, end it, or choose another "
        "run_dir"
    )
