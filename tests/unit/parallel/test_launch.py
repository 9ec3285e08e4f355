"""A launcher's variables form a launch, or the process is alone, or it is refused in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

from fp4pretrain.errors import UserError
from fp4pretrain.parallel.launch import Launch, check_address, is_main, launched

ROOT = Path(__file__).resolve().parents[3]
OWN_NAME = ("unshare", "--user", "--map-root-user", "--uts")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", Launch()),
        ("WORLD_SIZE=1", Launch()),
        ("LOCAL_RANK=3 MASTER_ADDR=n0", Launch()),
        ("RANK=0 WORLD_SIZE=1", Launch()),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", Launch(5, 8, 1)),
        ("WORLD_SIZE=4", "WORLD_SIZE: 4 is set without RANK; unset"),
        ("RANK=0", "RANK: 0 is set without WORLD_SIZE; unset"),
        ("RANK=2 WORLD_SIZE=2", "RANK: 2 is no rank of WORLD_SIZE=2; unset"),
        ("RANK=-1 WORLD_SIZE=2", "RANK: -1 is no rank"),
        ("RANK=a WORLD_SIZE=2", "RANK: 'a' is no whole number; unset"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x", "LOCAL_RANK: 'x' is no whole"),
    ],
)
def test_variables(variables: pytest.MonkeyPatch, given: str, expected: Launch | str) -> None:
    for setting in given.split():
        variables.setenv(*setting.split("="))
    if isinstance(expected, Launch):
        assert launched() == expected
        assert is_main() is (expected.rank == 0)
        return
    with pytest.raises(UserError, match=f"^{expected}"):
        launched()
    assert is_main()  # somebody has to say it


def test_a_launch_without_an_address(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("RANK", "0")
    variables.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="^MASTER_ADDR: not set, where RANK"):
        check_address()
    variables.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="^MASTER_PORT: not set"):
        check_address()
    variables.setenv("MASTER_PORT", "29500")
    check_address()


def _can_rename_the_host() -> bool:
    try:
        return subprocess.run([*OWN_NAME, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
# The host is renamed in a namespace of its own; without one the test would rename the machine.
@pytest.mark.skipif(not _can_rename_the_host(), reason="no namespaces here")
@pytest.mark.parametrize("how", ["launch/torchrun.sh", "torchrun"])
def test_one_node_needs_no_name(tmp_path: Path, how: str) -> None:
    """Two ranks on a machine whose own name resolves to nothing."""
    small = (
        "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
        "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=1 train.global_batch=2 "
        f"train.steps=1 data.valid_tokens=2048 data=mock logging=quiet parallel.device=cpu "
        f"run_dir={tmp_path}/r"
    )
    torchrun = f"{sys.executable} -m torch.distributed.run"
    if how.startswith("launch"):
        (tmp_path / "torchrun").write_text(f'#!/bin/sh\nexec {torchrun} "$@"\n')
        (tmp_path / "torchrun").chmod(0o755)
        command = f"{shutil.which('bash')} {ROOT / how} {small}"
    else:
        command = f"{torchrun} --nproc-per-node 2 --master-port {free_port()} -m fp4pretrain train {small}"
    done = subprocess.run(
        [*OWN_NAME, "sh", "-c", f"hostname no-such-host-here && exec {command}"],
        env=os.environ
        | {
            "NPROC_PER_NODE": "2",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "r" / "checkpoints" / "latest").is_file()
