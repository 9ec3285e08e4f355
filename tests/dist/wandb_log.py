"""What wandb has on disk of a run that it keeps offline."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _PART = 7, 32768, 7  # bytes of wandb's file, in LevelDB's log format
_FULL, _LAST = 1, 4


def not_recorded(run_dir: Path, *texts: bytes) -> list[bytes]:
    """Which texts wandb has not written to its transaction logs. Its process writes after ``finish``
    has returned, late on a busy machine."""
    deadline = time.monotonic() + 300
    while True:
        record = b"".join(path.read_bytes() for path in sorted(run_dir.glob("wandb/*/*.wandb")))
        missing = [text for text in texts if text not in record]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def finished(file: Path) -> list[Any]:
    """All records (``wandb_internal_pb2.Record``) of a transaction log, once wandb has written its end."""
    deadline = time.monotonic() + 300
    while True:
        found = list(records(file))
        if any(record.HasField("exit") for record in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def records(file: Path) -> Iterator[Any]:
    """The records of a transaction log that are there whole."""
    from wandb.proto import wandb_internal_pb2

    data, at, waiting = file.read_bytes(), _HEADER, b""
    while at + _PART <= len(data):
        if _BLOCK - at % _BLOCK < _PART:  # no part begins so late in a block
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + _PART])
        waiting += data[at + _PART : at + _PART + length]
        at += _PART + length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(waiting)
            waiting = b""
            yield record
