"""Two machines on one: network namespaces joined by a veth pair, each with its own torchrun.

A namespace has its own interfaces and ports, so nothing reaches from one to the other but what goes
through the pair, as over a cable. Making them takes root and the kernel's leave; where that is
missing, two loopback addresses stand in, and ``isolated`` is False.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Which processes are a node's: all that inherit this variable.
_MARK = "FP4PRETRAIN_TEST_NODE"


@dataclass(frozen=True)
class Node:
    """``enter`` is the command that runs another inside, ``interface`` its way to the others."""

    name: str
    address: str
    interface: str
    enter: tuple[str, ...] = ()

    @property
    def isolated(self) -> bool:
        return bool(self.enter)

    def torchrun(self, arguments: Sequence[str], log: Path, **settings: str) -> subprocess.Popen:
        """Start ``launch/torchrun.sh`` here, as a user would on this machine."""
        dropped = ("SLURM_", "MASTER_", "RDZV_", "NODE_RANK", "NNODES", "NPROC_PER_NODE")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.interface,
            "LOCAL_ADDR": self.address,
            _MARK: self.name,
            **settings,
        }
        with log.open("ab") as out:
            return subprocess.Popen(
                [*self.enter, str(ROOT / "launch" / "torchrun.sh"), *arguments],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def lose(self, command: bytes = b"") -> int:
        """SIGKILL to the node's processes whose command line holds ``command``; waits until no
        process of the node is left. How many were killed."""
        lost = self.processes(command)
        for process in lost:
            os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + 300
        while self.processes():
            assert time.monotonic() < deadline, f"{self.processes()} outlive {command!r}"
            time.sleep(0.02)
        return len(lost)

    def processes(self, command: bytes = b"") -> list[int]:
        """The node's living processes (a killed one that nobody waited for yet has no environment)."""
        mark = f"{_MARK}={self.name}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or command not in (entry / "cmdline").read_bytes():
                    continue
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it ended meanwhile, or is another user's
                continue
        return found


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that see each other; every process and namespace of theirs is gone afterwards."""
    names = [f"fp4-{os.getpid()}-{index}" for index in range(2)]
    wire = [f"fp4v{os.getpid()}{end}" for end in "ab"]
    try:
        nodes = [
            Node(name, f"10.77.0.{index}", interface, ("ip", "netns", "exec", name))
            for index, (name, interface) in enumerate(zip(names, wire, strict=True), start=1)
        ]
        if not _join_namespaces(nodes):
            nodes = [Node(name, f"127.0.0.{i}", "lo") for i, name in enumerate(names, start=1)]
        try:
            yield nodes[0], nodes[1]
        finally:
            for node in nodes:
                node.lose()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _join_namespaces(nodes: Sequence[Node]) -> bool:
    """Make the nodes' namespaces and the pair between them; False where this machine will not."""
    one, other = nodes
    commands = [f"ip netns add {node.name}" for node in nodes]
    commands.append(
        f"ip link add {one.interface} netns {one.name} type veth "
        f"peer name {other.interface} netns {other.name}"
    )
    for node in nodes:
        commands += [
            f"ip -n {node.name} address add {node.address}/24 dev {node.interface}",
            f"ip -n {node.name} link set {node.interface} up",
            f"ip -n {node.name} link set lo up",
        ]
    try:
        for command in commands:
            subprocess.run(command.split(), capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True
