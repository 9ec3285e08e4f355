#!/usr/bin/env python3
"""Do the pins of constraints.txt agree with each other and with pyproject.toml, on a fresh machine?

For each supported Python and platform the requirements (with the dev extra) are resolved against
the public package index alone. Wheels that lie on this machine do not count: its CPU build of torch,
for one, has no requirement on Triton, and the public CUDA build wants one exact version. Nothing is
installed, and only metadata is fetched.

uv resolves, because it evaluates environment markers for the Python asked for. `pip install
--dry-run --python-version 3.13` evaluates them for the Python that runs it, and cannot take a
package that has only sources (antlr4-python3-runtime).

usage: python scripts/resolve_constraints.py     status 1 where the pins disagree; without a
network every resolution is skipped by name
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
LINUX = "x86_64-manylinux_2_28"
PLATFORMS = (LINUX, "aarch64-manylinux_2_28", "aarch64-apple-darwin")
# Everything else of the pins comes as a wheel for Linux x86-64, so a newcomer compiles nothing.
SOURCE_ONLY = "antlr4-python3-runtime"
UNREACHABLE = ("client error (Connect)", "dns error", "operation timed out")


def resolve(python: str, platform: str) -> subprocess.CompletedProcess[str]:
    """uv's resolution of the project's requirements for one Python on one platform."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
    command += ["--extra", "dev", "--constraints", "constraints.txt"]
    command += ["--python-version", python, "--python-platform", platform]
    command += ["--no-config", "--no-python-downloads", "--no-annotate", "--no-header", "--quiet"]
    if platform == LINUX:
        command += ["--only-binary", ":all:", "--no-binary", SOURCE_ONLY]
    # No index, wheel folder or constraint of this machine: uv reads none of pip's settings, and
    # its own come from a file (--no-config) or from UV_*.
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    env |= {"UV_HTTP_RETRIES": "1", "UV_HTTP_TIMEOUT": "20", "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)


def main() -> int:
    failed = False
    for python in PYTHONS:
        for platform in PLATFORMS:
            name = f"constraints on Python {python}, {platform}"
            done = resolve(python, platform)
            if done.returncode == 0:
                pins = done.stdout.splitlines()
                triton = next((pin for pin in pins if pin.startswith("triton==")), "no Triton")
                print(f"{name}: {len(pins)} packages, {triton}")
            elif any(sign in done.stderr for sign in UNREACHABLE):
                print(f"{name}: SKIPPED, the public package index cannot be reached")
            else:
                failed = True
                print(f"{name}: FAILED\n{done.stderr}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
