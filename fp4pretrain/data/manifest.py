"""Which files a dataset has, how long they are, and hashes of what is in them: a part of PREFIX.json.

`data build` writes it. Sizes are held against the files whenever a dataset is opened, hashes by
``fp4pretrain data verify``. Datasets of Megatron's own tools have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4pretrain.errors import UserError

FILES = "files"  # its key in PREFIX.json


def described(prefix: str, suffixes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Suffix -> {bytes, sha256} of PREFIX's files as they are. Raises OSError."""
    return {
        suffix: {"bytes": Path(prefix + suffix).stat().st_size, "sha256": _hash(prefix + suffix)}
        for suffix in suffixes
    }


def check_sizes(prefix: str, meta: Mapping[str, Any], *, key: str) -> None:
    """Hold the sizes of PREFIX's files against what PREFIX.json says, if it says any.

    Raises:
        UserError: a file is missing or has another size, or the manifest is none.
    """
    for suffix, said in _manifest(prefix, meta, key).items():
        path = Path(prefix + suffix)
        found = path.stat().st_size if path.is_file() else None
        if found != said["bytes"]:
            has = "is missing" if found is None else f"has {found:,} bytes"
            raise UserError(
                f"{key}: {path} {has} where {prefix}.json says {said['bytes']:,}; build or copy the dataset "
                "again"
            )


def check_content(prefix: str, meta: Mapping[str, Any], *, key: str) -> int:
    """Hold the content of PREFIX's files against the hashes of PREFIX.json; returns how many it has.

    Raises:
        UserError: a file has other content.
    """
    said = _manifest(prefix, meta, key)
    for suffix, file in said.items():
        if _hash(prefix + suffix) != file["sha256"]:
            raise UserError(
                f"{key}: {prefix}{suffix} is damaged: its content is not what was written (SHA-256 of "
                f"{prefix}.json); build or copy the dataset again"
            )
    return len(said)


def _manifest(prefix: str, meta: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    found = meta.get(FILES, {})
    good = isinstance(found, dict) and all(
        isinstance(file, dict)
        and type(file.get("bytes")) is int
        and isinstance(file.get("sha256"), str)
        and suffix.startswith(".")
        and "/" not in suffix
        for suffix, file in found.items()
    )
    if not good:
        raise UserError(f"{key}: the files in {prefix}.json are damaged; build the dataset again")
    return found


def _hash(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
