"""``scripts/layouts``: what is measured again, what a table says, when the command fails."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from fp4pretrain.config import ParallelConfig, compose
from fp4pretrain.model.layout import check_layout

FOLDER = str(Path(__file__).resolve().parents[3] / "scripts" / "layouts")
ROW = {"model": "gpt_6_7b", "recipe": "nvfp4", "kind": "strong", "batch": 32, "mfu": 0.4}
TIMES = {"communication_ms": 50.0, "hidden_ms": 20.0, "exposed_ms": 30.0, "idle_ms": 1.0}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A module of the script by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):  # their names are short, others may bear them
        if isinstance(module, ModuleType) and str(getattr(module, "__file__", "")).startswith(
            FOLDER
        ):
            del sys.modules[name]


def test_what_failed_is_measured_again(script, tmp_path: Path) -> None:
    results = script("lab").Results(tmp_path / "scaling.json")
    results.add("a", {"failed": "out of memory"})
    results.add("b", {"tokens_per_second": 1.0})
    again = script("lab").Results(tmp_path / "scaling.json")
    assert [again.lacks(key) for key in "abc"] == [True, False, True]


def test_a_ratio_is_to_the_one_gpu_of_its_own_recipe_and_model(script, tmp_path: Path) -> None:
    rows = {
        "gpt_6_7b, nvfp4, 1 GPU, strong": ROW | {"layout": "1 GPU", "tokens_per_second": 1000.0},
        "gpt_6_7b, nvfp4, TP 4, strong": ROW
        | {"layout": "TP 4", "tokens_per_second": 3300.0}
        | TIMES,
        "gpt_6_7b, bf16, TP 4, strong": ROW
        | {"recipe": "bf16", "layout": "TP 4", "failed": "a\nb | c"},
    }
    for row in rows.values():
        row["memory_gib"] = 40.0
    table = script("tables").scaling_table(rows)
    assert (
        "| TP 4 | 32 | 3,300 | 3.30 | 3.20 | 40.0% | 50 ms | 40% | 30 ms | 1 ms | 40.0 |" in table
    )
    assert "failed: b / c" in table
    assert {line.count("|") for line in table.splitlines()} == {14}
    (tmp_path / "scaling.json").write_text(json.dumps(rows))
    assert not script("tables").holds(tmp_path)
    del rows["gpt_6_7b, bf16, TP 4, strong"]
    (tmp_path / "scaling.json").write_text(json.dumps(rows))
    assert script("tables").holds(tmp_path)
    (tmp_path / "kills.json").write_text(
        json.dumps({"x": {"same_rows": True, "same_state": False}})
    )
    assert not script("tables").holds(tmp_path)


@pytest.mark.parametrize(
    ("layout", "kind", "aim"),
    [
        ("DP 8", "weak", 7.7),
        ("DP 8", "strong", None),
        ("DP 4", "weak", 3.85),
        ("TP 4", "strong", 3.2),
        ("TP 2 x PP 2 x DP 2 + SP", "weak", 6.4),
        ("TP 2 x PP 2", "strong", 3.2),
        ("1 GPU", "strong", None),
    ],
)
def test_aims(script, layout: str, kind: str, aim: float | None) -> None:
    assert script("scaling").aim("gpt_6_7b", layout, kind) == pytest.approx(aim)


def test_every_layout_and_model_of_the_grid_fits_its_ranks(script) -> None:
    """Of the models that GPUs train too: a layout that is refused there would cost device time."""
    lab, scaling = script("lab"), script("scaling")
    for model in scaling.MODELS:
        key = f"{model}, nvfp4, {lab.grid.ONE}, strong"
        one = scaling.task_of(Path("work"), "cpu", key, batch=(32, 4))
        config = compose(list(one.overrides))
        for name, kind in scaling.ORDER:
            key = f"{model}, nvfp4, {name}, {kind}"
            task = scaling.task_of(Path("work"), "cpu", key, batch=(32, 4))
            given = dict(text.split("=", 1) for text in task.overrides)
            parallel = {
                key.removeprefix("parallel."): yaml.safe_load(value)
                for key, value in given.items()
                if key.startswith("parallel.")
            }
            train = replace(config.train, global_batch=int(given["train.global_batch"]))
            laid = replace(config, parallel=ParallelConfig(**parallel), train=train)
            check_layout(laid, task.size)
    assert {name for name, _ in scaling.ORDER} == lab.grid.LAYOUTS.keys() - {lab.grid.ONE}


def test_parts_have_their_seconds_or_an_hour(script) -> None:
    parts_of = script("lab").parts_of
    assert parts_of("kills:60,scaling") == {"kills": 60.0, "scaling": 3600.0}
    for wrong in ("kill", "kills:a", "kills:60:7"):
        with pytest.raises(argparse.ArgumentTypeError):
            parts_of(wrong)
