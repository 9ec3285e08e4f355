"""``bench casts``: which casts are timed, from what, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fp4pretrain.bench import casts
from fp4pretrain.cli import main
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import Cast
from fp4pretrain.precision import Dgrad, Fprop, Recipe, Wgrad


class Timed:
    """Takes so many nanoseconds an element, twice as many in every other call."""

    def __init__(self, clock: list[int], cost: int) -> None:
        self.clock, self.cost, self.seen = clock, cost, []

    def quantize(self, x: Tensor, made: Sequence[Cast]) -> list[Any]:
        self.seen.append((tuple(x.shape), x.dtype, made[0].site.operand if made[0].site else None))
        self.clock[0] += self.cost * x.numel() * (1 + len(self.seen) % 2)
        return []


def test_the_least_of_each_cast_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr(casts.time, "perf_counter_ns", lambda: clock[0])
    slow, fast = Timed(clock, 6), Timed(clock, 2)
    nv = QuantSpec("nvfp4")
    recipe = Recipe(Fprop(nv, nv), Dgrad(nv, QuantSpec()), Wgrad(nv, nv))
    found = casts.bench_casts({"mine": recipe}, (64, 32, 48), backends=(slow, fast))
    told = [
        (one["operand"], one["reference"], one["cpp"], one["ratio"]) for one in found["timings"]
    ]
    names = ("fprop x", "fprop w", "dgrad dy", "wgrad dy", "wgrad x")  # dgrad's w is not cast
    assert told == [(name, 6.0, 2.0, 3.0) for name in names]
    assert (
        set(slow.seen)
        == set(fast.seen)
        == {
            ((64, 32), torch.bfloat16, "x"),
            ((48, 32), torch.float32, "w"),
            ((64, 48), torch.bfloat16, "dy"),
        }
    )
    text = StringIO()
    Console(file=text, width=120).print(casts.table(json.loads(json.dumps(found))))
    assert "64x32x48" in text.getvalue() and text.getvalue().count("6.00") == 5


def test_without_a_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(casts, "why_missing", lambda: "none of g++ is there")
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "casts"])
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert said == "fp4pretrain: bench casts: there are no C++ casts here (none of g++ is there)\n"


def test_keys_reach_the_timed_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed: dict[str, Recipe] = {}
    monkeypatch.setattr(casts, "bench_casts", lambda recipes: timed.update(recipes) or {})
    monkeypatch.setattr(casts, "table", lambda _: "")
    keys = ["precision.fprop.x.ties=away", "--out", str(tmp_path)]
    main(["bench", "casts", "--precision", "nvfp4", *keys])
    assert timed["nvfp4"].fprop.x.ties == "away" and (tmp_path / "casts.json").exists()
