"""baseline=FOLDER: each evaluation says the gap at its tokens, and an unequal baseline is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wandb_log import finished

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.observe import read_rows
from fp4pretrain.sweep import train_all
from fp4pretrain.train.main import train

RUN = (
    "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=64 model.seq_length=32 data.mock=true parallel.device=cpu "
    "precision.keep.last_blocks=0 train.steps=4 train.micro_batch=1 train.global_batch=2 "
    "data.valid_tokens=64 logging=quiet checkpoint.at_end=false"
).split()


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gap") / "bf16"
    return train(compose([*RUN, "precision=bf16", "train.eval_interval=2", f"run_dir={path}"]))


def test_evaluations_hold_the_gap_at_their_tokens(baseline: Path, tmp_path: Path) -> None:
    """Where the baseline was evaluated too, its loss; between two evaluations a line; before the first,
    nothing. The run ends with the comparison's table and page."""
    run = ["precision=mxfp4_h16", "train.eval_interval=1", f"run_dir={tmp_path / 'run'}"]
    wandb = ["logging.wandb.mode=offline", f"baseline={baseline}"]
    train_all([[*RUN, *run, *wandb]])
    theirs = {
        r["step"]: r["val_loss"] for r in read_rows(baseline / "metrics.jsonl") if "val_loss" in r
    }
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["event"] == "eval"]
    assert "gap" not in rows[0]
    expected = {2: theirs[2], 3: (theirs[2] + theirs[4]) / 2, 4: theirs[4]}
    for row in rows[1:]:
        assert row["baseline_val_loss"] == pytest.approx(expected[row["step"]], rel=1e-9)
        assert row["gap"] == pytest.approx(row["val_loss"] / expected[row["step"]] - 1, rel=1e-9)
        assert "gap_bf16" in row  # the baseline quantizes nothing: its loss is its own in BF16
    assert (tmp_path / "run" / "compare.html").is_file()
    _told_wandb(tmp_path / "run", gap=rows[-1]["gap"])


def _told_wandb(run: Path, *, gap: float) -> None:
    """Its summary sorts by the gap at the end, and the table of differences names the recipe's."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    items = {
        item.key: json.loads(item.value_json)
        for record in finished(file)
        for item in record.summary.update
        if item.key.startswith("final/")
    }
    assert items["final/gap_percent"] == pytest.approx(100 * gap)
    shares = [items[f"final/{name}_flops_percent"] for name in ("fp4", "fp8", "bf16")]
    assert sum(shares) == pytest.approx(100) and shares[0] > 10
    assert items["final/tokens_per_second"] > 0
    (table,) = run.glob("wandb/offline-run-*/files/media/table/config_diff*.json")
    differing = {key: (there, here) for key, there, here in json.loads(table.read_text())["data"]}
    assert differing["precision.fprop.x.format"] == ("bf16", "mxfp4")
    assert all(key.startswith("precision.") for key in differing)


@pytest.mark.parametrize(
    "change, named",
    [
        ("optim.eps=1e-5", r"optim\.eps \(1e-08 there, 1e-05 here\)"),
        ("seed=5", "seed"),
        ("train.steps=5", r"train\.steps"),
        ("precision=bf16", "own recipe"),
    ],
)
def test_a_baseline_that_differs_in_more_than_the_recipe_is_refused(
    baseline: Path, tmp_path: Path, change: str, named: str
) -> None:
    path = tmp_path / "run"
    overrides = [*RUN, "precision=mxfp4_h16", change, f"baseline={baseline}", f"run_dir={path}"]
    with pytest.raises(UserError, match=named):
        train_all([overrides])
    assert not (path / "metrics.jsonl").exists()


def test_a_baseline_is_a_recipe_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe and no run's folder"):
        compose(["baseline=fp9"])
    with pytest.raises(UserError, match=r"baseline: .*no metrics\.jsonl"):
        train_all(
            [[*RUN, "precision=mxfp4_h16", f"baseline={tmp_path}", f"run_dir={tmp_path / 'a'}"]]
        )
