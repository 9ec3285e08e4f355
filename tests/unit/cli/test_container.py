"""README's two commands as a container runs them: a user that nobody knows, no HOME, a C locale, the
checkout read-only. What pip would install there is resolved by scripts/resolve_constraints.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
UNKNOWN = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
CHECKOUT = ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "launch")
SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=1 train.global_batch=2 "
    "train.steps=2 data.valid_tokens=2048 parallel.device=cpu"
)


def _can_be_unknown() -> bool:
    """Whether this machine lets a process be a user that is in no passwd."""
    try:
        return subprocess.run([*UNKNOWN, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not _can_be_unknown(), reason="no user namespaces here")


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkout/ (read-only), venv/ (as an image brings it) and work/, the folder of the user."""
    folder = tmp_path_factory.mktemp("container")
    checkout, binaries = folder / "checkout", folder / "venv" / "bin"
    checkout.mkdir()
    for name in CHECKOUT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    ignored = shutil.ignore_patterns(".hypothesis")
    for name in ("fp4pretrain", "kernels", "configs", "tests"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    for made in (binaries, folder / "work", folder / "tmp"):
        made.mkdir(parents=True)
    paths = f"{checkout}{os.pathsep}{checkout / 'kernels'}"
    python = f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} "$@"\n'
    script = f'#!/bin/sh\nexec {binaries}/python -m fp4pretrain "$@"\n'
    for name, text in (("python", python), ("fp4pretrain", script)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    for path in [checkout, *checkout.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    for stamp in (".installed", ".installed-dev"):
        (folder / "venv" / stamp).touch()
    return folder


def _run(container: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TMPDIR": str(container / "tmp")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}
    return subprocess.run(
        [*UNKNOWN, *command],
        cwd=container / "work",
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _make(container: Path, target: str, arguments: str, **more: str) -> subprocess.CompletedProcess:
    makefile = str(container / "checkout" / "Makefile")
    settings = (f"VENV={container / 'venv'}", "NAME=demo", f"ARGS={arguments}")
    return _run(container, "make", "-f", makefile, target, *settings, **more)


def test_the_place_is_as_said(container: Path) -> None:
    look = (
        "import getpass, os, pathlib\n"
        f"print(os.access({str(container / 'checkout')!r}, os.W_OK))\n"
        "try: print(pathlib.Path.home(), getpass.getuser())\n"
        "except (RuntimeError, KeyError, OSError): print('nobody')\n"
    )
    done = _run(container, sys.executable, "-c", look)
    assert done.stdout.split() == ["False", "nobody"], done.stderr


@pytest.mark.slow
def test_make_train(container: Path) -> None:
    """Two runs and their comparison: the home that Docker gives to an unknown user, a console of ASCII."""
    done = _make(container, "train", SMALL, PYTHONIOENCODING="ascii", HOME="/")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = container / "work" / "runs"
    assert {path.name for path in runs.iterdir()} == {"demo-fp8", "demo-nvfp4"}
    assert (runs / "demo-nvfp4" / "compare.html").is_file()
    assert "did not start" not in done.stdout  # wandb
    assert "Traceback" not in done.stderr
    assert done.stdout.isascii()


def test_make_test(container: Path) -> None:
    done = _make(container, "test", "tests/unit/numerics/test_numerics_spec.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "[100%]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data", "build", "{checkout}/README.md", "--out", "{checkout}/x"], r"out: cannot write in"),
        (["data", "build", "secret.txt", "--out", "x"], r"inputs: secret.txt cannot be read (Permi"),
        (["data", "build", "closed", "--out", "x"], r"inputs: closed cannot be read (Permission"),
        (["data", "train-bpe", "{checkout}/README.md", "--vocab-size", "300", "--out",
          "{checkout}/b.json"], r"out: cannot write in"),
        (["train", "data=mock", "run_dir={checkout}/run"], r"cannot be written"),
        (["train", "data=mock", "run_dir='~/run'"], r"~/run names a home folder that is not there"),
        (["compare", "closed/a", "closed/b"], r"closed/a"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_or_written_is_one_line(
    container: Path, arguments: list[str], says: str
) -> None:
    work = container / "work"
    (work / "secret.txt").write_text("mine")
    (work / "secret.txt").chmod(0)
    (work / "closed").mkdir(mode=0, exist_ok=True)
    given = [text.format(checkout=container / "checkout") for text in arguments]
    done = _run(container, str(container / "venv" / "bin" / "fp4pretrain"), *given)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fp4pretrain: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
