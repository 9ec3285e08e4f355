"""Synthetic runs whose losses are known in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

STEPS = 200
TOKENS = 1024


def loss_at(tokens: float) -> float:
    return 6 - 4 * tokens / (STEPS * TOKENS)


def write_fingerprint(
    path: Path, *, validation: str = "v", order: str = "o", plan: str = ""
) -> None:
    """What a run leaves beside its config, of the config that it has."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    seeds = {
        "seed": config["seed"],
        "data.seed": config.get("data", {}).get("seed", config["seed"]),
    }
    found = {
        "plan": plan or config["precision"]["fprop"]["x"]["format"],
        "seeds": seeds,
        "entries": {"optim.eps": config["optim"]["eps"], **seeds},
        "data": {
            "data.order": f"{order} {seeds['data.seed']}",
            "data.validation": {"validation": {"digest": validation, "tokens": 1, "sequences": 1}},
        },
    }
    (path / "fingerprint.json").write_text(json.dumps(found))


def write_run(
    path: Path,
    *,
    gap: float = 0.0,
    steps: range = range(1, STEPS + 1),
    batch: int = TOKENS,
    rate: float = 1000.0,
    rows: dict[str, Any] | None = None,
    every: int = 50,
    parts: list[float] | None = None,
    **config: Any,
) -> Path:
    """A run directory: loss ``loss_at * (1 + gap)``, validation 0.1 above with half the gap.

    ``parts``: by how much the losses of the parts of the validation set differ from its mean.
    """
    path.mkdir()
    with (path / "metrics.jsonl").open("w") as file:
        for step in steps:
            tokens = step * batch
            warming = step < steps.start + 5
            row = {
                "event": "train",
                "step": step,
                "tokens": tokens,
                "loss": loss_at(tokens) * (1 + gap),
                "tokens_per_second": 1.0 if warming else rate,
                **(rows or {}),
            }
            file.write(json.dumps(row) + "\n")
            if step % every == 0:
                val = (loss_at(tokens) + 0.1) * (1 + gap / 2)
                row = {"event": "eval", "step": step, "tokens": tokens, "val_loss": val}
                if parts is not None:
                    row["val_loss_parts"] = [val + part for part in parts]
                file.write(json.dumps(row) + "\n")
    tree = {
        "seed": 1,
        "run_dir": str(path),
        "name": path.name,
        "optim": {"eps": 1e-8, "lr": 1e-3},
        "precision": {"fprop": {"x": {"format": path.name}}},
        **config,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    (path / "plan.txt").write_text(f"fprop x {path.name} <1d>\n")
    return path
