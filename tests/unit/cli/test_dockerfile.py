"""What can be known of the Dockerfile without building it: hadolint's main rules, and its own commands
on this checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def _instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, argument), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in pairs]


def _stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in _instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = [(word, rest)]
        elif found:
            found[list(found)[-1]].append((word, rest))
    return found


def test_the_image_is_pinned_and_the_last_stage_is_what_runs() -> None:
    stages = _stages()
    assert list(stages) == ["base", "dev", "run"]
    outside = [rest for stage in stages.values() for word, rest in stage if word == "FROM"]
    assert outside[0].startswith("nvcr.io/nvidia/pytorch:${NGC}-py3")
    assert ("ARG", "NGC=26.05") in _instructions()
    assert [rest.split()[0] for rest in outside[1:]] == ["base", "base"]
    assert ("ENTRYPOINT", '["fp4pretrain"]') in stages["run"]


def test_no_stage_that_is_run_is_roots() -> None:
    for name in ("dev", "run"):
        users = [rest for word, rest in _stages()[name] if word == "USER"]
        assert users[-1:] == ["trainer"]
    made = " ".join(rest for word, rest in _stages()["base"] if word == "RUN")
    assert re.search(r"useradd [^&]*\btrainer\b", made)


def test_pip_keeps_nothing_and_replaces_nothing() -> None:
    """Every install is without a cache, with the image's pins or without dependencies, and what the
    image brought is compared afterwards."""
    runs = [rest for word, rest in _instructions() if word == "RUN"]
    installs = [part for run in runs for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3
    for one in installs:
        assert "--no-cache-dir" in one
        assert "-c /opt/keep.txt" in one or "--no-deps" in one
    for run in runs:
        if "-c /opt/keep.txt" in run:
            assert run.rstrip().endswith("grep -Fxf /opt/keep.txt | cmp - /opt/keep.txt")
    # a pipe whose first command fails must fail the build
    assert ("SHELL", '["/bin/bash", "-o", "pipefail", "-c"]') in _instructions()


def test_what_is_copied_is_there_and_the_requirements_are_the_projects(tmp_path: Path) -> None:
    for word, rest in _instructions():
        if word == "COPY":
            assert (ROOT / rest.split()[0]).exists()
    runs = " ".join(rest for word, rest in _instructions() if word == "RUN")
    code = re.search(r'python -c "([^"]+)"', runs)
    assert code
    here = code[1].replace("/opt/fp4pretrain", str(ROOT))
    done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.splitlines() == project["dependencies"]
    keep = re.search(r"grep -iE '([^']+)'", runs)
    assert keep
    listed = [
        "torch==2.11.0a0",
        "triton==3.6",
        "transformer_engine==2.20",
        "numpy==2.1",
        "apex==0.1",
    ]
    assert [x for x in listed if re.search(keep[1], x, re.IGNORECASE)] == [
        x for x in listed if "numpy" not in x
    ]
