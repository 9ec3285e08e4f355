"""The digest of the code, by which nodes are told apart and runs remember what made them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fp4pretrain import version

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("suffix", [".py", ".cpp", ".h"])
def test_every_source_counts(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ too: it makes the casts of a run on a CPU."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(version, "_PACKAGE", tmp_path / "fp4pretrain")
    before = version.sources_digest.__wrapped__()
    source = sorted((tmp_path / "kernels").rglob(f"*{suffix}"))[0]
    source.write_bytes(source.read_bytes() + b"\n")
    assert version.sources_digest.__wrapped__() != before
