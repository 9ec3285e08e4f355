"""Random runs: whatever is set to whatever, a run of two steps ends well or is refused in one line.

What composes may still not build, so these go through the trainer: model, data, optimizer, two steps,
an evaluation and a checkpoint. A traceback fails the test, and so does a run that does not answer.
"""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest

from fp4pretrain import presets
from fp4pretrain.checks import CHOICES
from fp4pretrain.config import RunConfig, schema_keys
from fp4pretrain.numerics.formats import FORMATS

SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=32 train.micro_batch=1 train.global_batch=2 "
    "train.steps=2 data.valid_tokens=256 logging.wandb.mode=disabled logging.console=quiet "
    "data.mock=true"
).split()
NUMBERS = "0 1 2 3 5 7 10 16 33 64 100 0.5 1.0 1e-30 1e30 -1 inf".split()
WORDS = ["null", "true", "false", "x", "'a b'", "[a]", "{}", "'0.5,0.5,0'", "'1,0,0'"]
# Where a run writes is the test's; watchdogs and profiles are about time, which a test has not.
NOT_DRAWN = ("logging.", "guard.hang", "profile", "run_dir", "data.cache_dir", "baseline")

pytestmark = pytest.mark.xdist_group("ranks")


def _keys() -> list[str]:
    keys = [k for k in sorted(schema_keys()) if not k.startswith(NOT_DRAWN)]
    return [k for k in keys if not dataclasses.is_dataclass(_default(k))]


def _default(key: str) -> Any:
    node: Any = RunConfig()
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _value(key: str, rng: random.Random) -> str:
    """One that is meant for the key, three times of four; any other."""
    meant = {
        "format": list(FORMATS),
        "block": ["default", "1d", "2d", "tensor", "row"],
        "rounding": ["nearest", "stochastic", "stochastic_full"],
        "kind": ["none", "hadamard", "random_hadamard"],
        "resample": ["never", "layer", "step", "gemm"],
        "ties": ["even", "away"],
        "dtype": ["bf16", "fp32"],
        "signs": ["seed", "te"],
    }.get(key.rpartition(".")[2], list(CHOICES.get(key, NUMBERS)))
    return rng.choice(meant if rng.random() < 0.75 else NUMBERS + WORDS)


def _line(rng: random.Random) -> list[str]:
    # schedules of large models warm up for more steps than these runs have
    offered = {"precision": presets.groups()["precision"], "optim": ["tiny", "wsd", "cosine"]}
    overrides = [
        f"{group}={rng.choice(options)}" for group, options in offered.items() if rng.random() < 0.4
    ]
    for key in rng.sample(_keys(), rng.choice((1, 1, 2, 3))):
        overrides.append(f"{key}={_value(key, rng)}")
    return overrides


@pytest.mark.parametrize(
    "lines", [16, pytest.param(400, marks=pytest.mark.long)], ids="{} lines".format
)
def test_a_random_run_ends_well_or_is_refused_in_one_line(
    ranks, tmp_path: Path, lines: int
) -> None:
    rng = random.Random(lines)
    ran = 0
    for number in range(lines):
        overrides = _line(rng)
        print(*overrides, flush=True)
        reply = ranks.run(
            "train", [*SMALL, *overrides, f"run_dir={tmp_path / str(number)}"], size=1
        )
        said = reply.get("user_error")
        if said is None:
            assert Path(reply["path"], "metrics.jsonl").exists()
            ran += 1
        else:
            assert re.match(r"\S.*: \S", said), said
            assert said.isprintable(), said
    print(f"{ran} of {lines} ran")
    assert lines / 5 < ran < lines  # both ends of the law are met
