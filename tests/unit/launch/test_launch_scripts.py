"""The launch scripts: what they would run, and that ranks and signals arrive.

Slurm's own commands are stood in for by small scripts on PATH; torchrun is the real one where ranks
matter.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
_PATIENCE = 300.0  # seconds, on a machine that is busy with other things
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

FAKE_SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames gpu[03-04]") printf "gpu03\\ngpu04\\n" ;;
  requeue*) echo "$*" ;;
esac
"""

# Plays srun with tasks that save when they are warned, and fail afterwards.
FAKE_STEP = f"""#!{sys.executable}
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: (print("saved", flush=True), sys.exit(7)))
print("ready", flush=True)
while True:
    signal.pause()
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
    dropped = (
        *("SLURM_", "MASTER_", "RDZV_", "NODE_RANK", "NNODES", "NPROC_PER_NODE"),
        *("MAX_RESTARTS", "LOCAL_ADDR"),
    )
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


C10D = "--rdzv-backend c10d --rdzv-id"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ("", "--nnodes 1 --nproc-per-node 8 --max-restarts 0 --standalone --local-addr 127.0.0.1"),
        (
            "MAX_RESTARTS=3",
            "--nnodes 1 --nproc-per-node 8 --max-restarts 3 --standalone --local-addr 127.0.0.1",
        ),
        (
            "NNODES=2 NODE_RANK=1 MASTER_ADDR=n0",
            "--nnodes 2 --nproc-per-node 8 --max-restarts 0 "
            "--node-rank 1 --master-addr n0 --master-port 29500",
        ),
        (
            "NNODES=4 SLURM_NODEID=3 MASTER_ADDR=n0 MASTER_PORT=12345 LOCAL_ADDR=10.0.0.3",
            "--nnodes 4 --nproc-per-node 8 --max-restarts 0 "
            "--node-rank 3 --master-addr n0 --master-port 12345 --local-addr 10.0.0.3",
        ),
        # a rendezvous that takes in a node's replacement; node 0 hosts it
        (
            "NNODES=2 NODE_RANK=0 MASTER_ADDR=n0 MAX_RESTARTS=3",
            f"--nnodes 2 --nproc-per-node 8 --max-restarts 3 {C10D} fp4pretrain "
            "--rdzv-endpoint n0:29500 --rdzv-conf is_host=1",
        ),
        (
            "NNODES=1:2 SLURM_NODEID=1 MASTER_ADDR=n0 RDZV_CONF=join_timeout=60",
            f"--nnodes 1:2 --nproc-per-node 8 --max-restarts 0 {C10D} fp4pretrain "
            "--rdzv-endpoint n0:29500 --rdzv-conf is_host=0,join_timeout=60",
        ),
        (
            "NNODES=2 RDZV_ENDPOINT=n0:4000 RDZV_ID=job7 RDZV_CONF=is_host=1",
            f"--nnodes 2 --nproc-per-node 8 --max-restarts 0 {C10D} job7 "
            "--rdzv-endpoint n0:4000 --rdzv-conf is_host=1",
        ),
    ],
)
def test_torchrun_is_told_where_it_is(settings: str, options: str) -> None:
    named = dict(setting.split("=", 1) for setting in settings.split())
    printed = _printed("model=tiny", "resume=auto", **named)
    assert printed == ["torchrun", *options.split(), *TAIL[:-1], "resume=auto"]


def test_arguments_arrive_as_they_were_given() -> None:
    awkward = ["data.path={a: {prefix: '/x y', weight: 1}}", "name=it's $HOME", "*"]
    assert _printed(*awkward)[-3:] == awkward


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("NNODES=2", "MASTER_ADDR: not set for 2 nodes; give"),
        ("MAX_RESTARTS=1", "MAX_RESTARTS: .*add resume=auto"),
        ("NNODES=1:2 MASTER_ADDR=n0", "MAX_RESTARTS: .*add resume=auto"),
    ],
)
def test_what_cannot_work_is_one_line(settings: str, line: str) -> None:
    named = dict(setting.split("=", 1) for setting in settings.split())
    result = subprocess.run(
        [LAUNCH / "torchrun.sh", "--print", "model=tiny"],
        env=_environment(NPROC_PER_NODE="8", **named),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert re.fullmatch(line + ".*\n", result.stderr)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_head_of_the_script(script: str, option: str) -> None:
    text = subprocess.check_output([LAUNCH / script, option], env=_environment(), text=True)
    assert "usage" in text
    assert "key=value" in text
    assert "set -euo" not in text


SLURM = {
    "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_ON_NODE": "96",
}


def _job(tmp_path: Path, *arguments: str, srun: str) -> subprocess.Popen:
    """slurm.sbatch as Slurm runs it: a copy, elsewhere, with stand-ins for Slurm's commands."""
    (tmp_path / "slurm_script").write_text((LAUNCH / "slurm.sbatch").read_text())
    commands = _with_commands(tmp_path, _environment(**SLURM), srun=srun, scontrol=FAKE_SCONTROL)
    return subprocess.Popen(
        ["bash", tmp_path / "slurm_script", *arguments],
        env=commands,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_slurm_starts_one_torchrun_on_each_of_two_nodes(tmp_path: Path) -> None:
    job = _job(tmp_path, "--print", "model=tiny", "train.steps=3", srun=FAKE_SRUN)
    printed, said = job.communicate(timeout=_PATIENCE)
    assert job.returncode == 0
    assert "--nodes 2 --ntasks-per-node 1 --cpus-per-task 96" in said
    expected = [
        f"torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 0 --node-rank {node} "
        "--master-addr gpu03 --master-port 24567".split()
        + TAIL
        for node in range(2)
    ]
    assert [shlex.split(line) for line in printed.splitlines()] == expected


@pytest.mark.parametrize(
    ("arguments", "requeued"),
    [
        (["model=tiny", "resume=auto"], "requeue 1234567\n"),
        (["model=tiny"], ""),
        (["name=no-resume=auto-here"], ""),
    ],
)
def test_slurm_queues_a_warned_run_again_that_can_go_on(
    tmp_path: Path, arguments: list[str], requeued: str
) -> None:
    """The warning reaches the tasks; they save and leave before the job goes back to the queue."""
    job = _job(tmp_path, *arguments, srun=FAKE_STEP)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=_PATIENCE)
    assert printed == "saved\n" + requeued
    assert job.returncode == 7


def test_slurm_ends_a_finished_job(tmp_path: Path) -> None:
    job = _job(tmp_path, "resume=auto", srun="#!/bin/sh\nexit 3\n")
    assert job.communicate(timeout=_PATIENCE) == ("", "")
    assert job.returncode == 3


def test_slurm_warns_the_script_and_may_queue_it_again() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)


def test_two_nodes_make_one_world(tmp_path: Path) -> None:
    """The real torchrun, both nodes on this machine, a stand-in for the package."""
    (tmp_path / "fp4pretrain").mkdir()
    (tmp_path / "fp4pretrain" / "__main__.py").write_text(FAKE_PACKAGE)
    report = tmp_path / "report"
    report.mkdir()
    shared = {
        "NNODES": "2",
        "NPROC_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
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
    assert [node.wait(timeout=_PATIENCE) for node in nodes] == [0, 0]
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
    assert script.wait(timeout=_PATIENCE) == 7
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
    assert script.wait(timeout=_PATIENCE) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(agent, 0)
    script.stdout.close()


def test_torchrun_is_found_in_the_environment_that_make_made_or_its_absence_said(
    tmp_path: Path,
) -> None:
    """Called from a shell in which no environment is active."""
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "torchrun.sh"
    script.write_bytes((LAUNCH / "torchrun.sh").read_bytes())
    script.chmod(0o755)
    command = ["/bin/bash", str(script), "--print", "model=tiny"]
    env = {"PATH": "/usr/bin:/bin"}
    if not any((Path(folder) / "torchrun").exists() for folder in ("/usr/bin", "/bin")):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"torchrun: not found; activate .*\n", done.stderr)
        binaries = tmp_path / ".venv" / "bin"
        binaries.mkdir(parents=True)
        _with_commands(binaries, {"PATH": ""}, torchrun="#!/bin/sh\n", python="#!/bin/sh\necho 3\n")
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert "--nproc-per-node 3" in done.stdout
