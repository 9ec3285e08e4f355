"""Kernels against the truth, bit for bit, in Triton's interpreter: no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interpreted import cases

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[str], list[str]]]:
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    stdin, stdout = worker.stdin, worker.stdout

    def answer(case: str) -> list[str]:
        stdin.write(case + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield answer
    stdin.close()
    worker.wait(timeout=300)


# Two groups: two of pytest's workers have an interpreter each.
GROUPED = [
    pytest.param(case, marks=pytest.mark.xdist_group(f"interpreter {i % 2}"))
    for i, case in enumerate(cases())
]


@pytest.mark.parametrize("case", GROUPED)
def test_a_kernel_equals_the_reference(ask: Callable[[str], list[str]], case: str) -> None:
    assert ask(case) == []
