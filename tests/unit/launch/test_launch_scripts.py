"""The launch scripts: what they would run, and that ranks and signals arrive.

Slurm's own commands are stood in for by small scripts on PATH; torchrun is the real one where ranks
matter.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
TAIL = ["-m", "fp4pretrain", "train", "model=tiny", "train.steps=3"]

FAKE_SRUN = """#!/usr/bin/env bash
echo "srun $*" >&2
while [[ "$1" == --* ]]; do
  [[ "$1" == --nodes ]] && nodes="$2"
  shift 2
done
for ((node = 0; node < nodes; node++)); do
  SLURM_NODEID=$node "$@"
done
"""

# Plays torchrun with one worker that writes which signal ended its wait.
FAKE_TORCHRUN = f"""#!{sys.executable}
import subprocess, sys
worker = '''
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: (print("checkpoint", flush=True), sys.exit(0)))
print("ready", flush=True)
while True:
    signal.pause()
'''
subprocess.run([sys.executable, "-c", worker], check=True)
sys.exit(7)
"""

FAKE_PACKAGE = """
import os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
line = " ".join(os.environ[name] for name in names) + " " + " ".join(sys.argv[1:])
open(os.path.join(os.environ["REPORT"], os.environ["RANK"]), "w").write(line)
"""


def _environment(**settings: str) -> dict[str, str]:
    """This process's environment without any setting of a launcher, its own interpreter first."""
    dropped = ("SLURM_", "MASTER_", "RDZV_", "NODE_RANK", "NNODES", "NPROC_PER_NODE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, **settings}


def _with_commands(folder: Path, environment: dict[str, str], **scripts: str) -> dict[str, str]:
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def _printed(*arguments: str, **settings: str) -> list[str]:
    result = subprocess.run(
        [LAUNCH / "torchrun.sh", "--print", *arguments],
        env=_environment(NPROC_PER_NODE="8", **settings),
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(result.stdout)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, "--nnodes 1 --nproc-per-node 8 --standalone"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0"},
            "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr n0 --master-port 29500",
        ),
        (
            {"NNODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "n0", "MASTER_PORT": "12345"},
            "--nnodes 4 --nproc-per-node 8 --node-rank 3 --master-addr n0 --master-port 12345",
        ),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "n0:4000", "RDZV_ID": "job7"},
            "--nnodes 2 --nproc-per-node 8 "
            "--rdzv-backend c10d --rdzv-endpoint n0:4000 --rdzv-id job7",
        ),
    ],
)
def test_torchrun_is_told_where_it_is(settings: dict[str, str], options: str) -> None:
    printed = _printed("model=tiny", "train.steps=3", **settings)
    assert printed == ["torchrun", *options.split(), *TAIL]


def test_arguments_arrive_as_they_were_given() -> None:
    awkward = ["data.path={a: {prefix: '/x y', weight: 1}}", "name=it's $HOME", "*"]
    assert _printed(*awkward)[-3:] == awkward


def test_several_nodes_need_the_head_node() -> None:
    result = subprocess.run(
        [LAUNCH / "torchrun.sh", "--print"],
        env=_environment(NNODES="2", NPROC_PER_NODE="8"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("MASTER_ADDR: not set for 2 nodes")


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_head_of_the_script(script: str, option: str) -> None:
    text = subprocess.check_output([LAUNCH / script, option], env=_environment(), text=True)
    assert "usage" in text
    assert "key=value" in text
    assert "set -euo" not in text


def test_slurm_starts_one_torchrun_on_each_of_two_nodes(tmp_path: Path) -> None:
    settings = {
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_ON_NODE": "96",
    }
    scontrol = '#!/bin/sh\n[ "$*" = "show hostnames gpu[03-04]" ] && printf "gpu03\\ngpu04\\n"\n'
    copy = tmp_path / "slurm_script"  # Slurm runs a copy, elsewhere
    copy.write_text((LAUNCH / "slurm.sbatch").read_text())
    result = subprocess.run(
        ["bash", copy, "--print", "model=tiny", "train.steps=3"],
        env=_with_commands(tmp_path, _environment(**settings), srun=FAKE_SRUN, scontrol=scontrol),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--nodes 2 --ntasks-per-node 1 --cpus-per-task 96" in result.stderr
    expected = [
        f"torchrun --nnodes 2 --nproc-per-node 4 --node-rank {node} "
        "--master-addr gpu03 --master-port 24567".split()
        + TAIL
        for node in range(2)
    ]
    assert [shlex.split(line) for line in result.stdout.splitlines()] == expected


def test_two_nodes_make_one_world(tmp_path: Path) -> None:
    """The real torchrun, both nodes on this machine, a stand-in for the package."""
    (tmp_path / "fp4pretrain").mkdir()
    (tmp_path / "fp4pretrain" / "__main__.py").write_text(FAKE_PACKAGE)
    report = tmp_path / "report"
    report.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "NNODES": "2",
        "NPROC_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": str(tmp_path),
        "REPORT": str(report),
    }
    nodes = [
        subprocess.Popen(
            [LAUNCH / "torchrun.sh", "model=tiny"],
            env=_environment(NODE_RANK=str(rank), **shared),
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    assert [node.wait(timeout=60) for node in nodes] == [0, 0]
    lines = [path.read_text() for path in sorted(report.iterdir())]
    assert lines == [f"{rank} {rank % 2} 4 train model=tiny" for rank in range(4)]


def test_a_warning_signal_reaches_the_worker_and_the_exit_status_comes_back(tmp_path: Path) -> None:
    script = subprocess.Popen(
        [LAUNCH / "torchrun.sh"],
        env=_with_commands(tmp_path, _environment(NPROC_PER_NODE="1"), torchrun=FAKE_TORCHRUN),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "ready\n"
    script.send_signal(signal.SIGUSR1)
    assert script.stdout.readline() == "checkpoint\n"
    assert script.wait(timeout=10) == 7
    script.stdout.close()


def test_termination_ends_torchrun(tmp_path: Path) -> None:
    idle = f"#!{sys.executable}\nimport os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    script = subprocess.Popen(
        [LAUNCH / "torchrun.sh"],
        env=_with_commands(tmp_path, _environment(NPROC_PER_NODE="1"), torchrun=idle),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    agent = int(script.stdout.readline())
    start = time.monotonic()
    script.terminate()
    assert script.wait(timeout=10) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(agent, 0)
    script.stdout.close()
