"""Ports for tests that must name one before a process opens it."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of this machine that is free, below those that the kernel gives to whoever asks for any
    (32768 and up on Linux): one of those may be taken again before its process has started."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
