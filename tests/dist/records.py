"""What a run left on disk, in a form that two runs can be compared in, bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

TIMING = ("tokens_per_second", "mfu", "memory_gib")


def curve(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, each step once, without what a clock or the machine says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({(row["event"], row["step"]) for row in rows}) == len(rows)
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer state included, whole."""
    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in metadata.items()
        if hasattr(m, "size")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state
