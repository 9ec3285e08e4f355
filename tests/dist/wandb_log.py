"""What wandb has on disk of a run that it keeps offline."""

from __future__ import annotations

import time
from pathlib import Path


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
