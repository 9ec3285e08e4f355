"""What a run left on disk, in a form that two runs can be compared in, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fp4pretrain.train.checkpoint import read_manifest, read_part

TIMING = ("tokens_per_second", "mfu", "memory_gib", "time")


def curve(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, each step once, without what a clock or the machine says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({(row["event"], row["step"]) for row in rows}) == len(rows)
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer state included, whole."""
    whole = {}
    for key, tensor in read_manifest(checkpoint).tensors.items():
        whole[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        read_part(checkpoint, tensor, offset=(0,) * len(tensor.shape), out=whole[key])
    return whole


def same_state(one: Path, other: Path) -> dict[str, Any]:
    """Every whole tensor and every number of two checkpoints is the same, but for what belongs to a
    layout. Returns what run.json says."""
    a, b = (
        {k: t for k, t in weights(path).items() if not k.startswith("rng.")}
        for path in (one, other)
    )
    assert a.keys() == b.keys()
    assert {k.split(".")[2] for k in a if k.startswith("optimizer.")} >= {"exp_avg", "exp_avg_sq"}
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    runs = [json.loads((path / "run.json").read_text()) for path in (one, other)]
    for run in runs:
        del run["parallel"]
    assert runs[0] == runs[1]
    return dict(runs[0])
