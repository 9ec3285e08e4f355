"""Observing a run: nothing of it changes, and a row says what its casts did."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.observe import read_rows
from fp4pretrain.train.main import check_run, train

RUN = (
    "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=64 model.seq_length=32 data.mock=true parallel.device=cpu "
    "parallel.distributed_optimizer=false precision=nvfp4 precision.keep.last_blocks=0 train.steps=4 "
    "train.micro_batch=1 train.global_batch=2 train.eval_interval=2 data.valid_tokens=64 "
    "logging=quiet checkpoint.at_end=false"
).split()
EVERYTHING = (
    "[sqnr,cosine,underflow,saturation,inexact,kurtosis,crest,amax_spread,scales,draws,"
    "gradient_noise,oscillation]"
)


def rows_of(path: Path, *overrides: str) -> list[dict]:
    train(compose([*RUN, f"run_dir={path}", *overrides]))
    return read_rows(path / "metrics.jsonl")


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_losses_are_bit_for_bit_those_of_an_unobserved_run(tmp_path: Path, recompute: str) -> None:
    """With an evaluation before an observed step, whose casts of weights must not hide from it."""
    how = f"parallel.recompute={recompute}"
    plain = rows_of(tmp_path / "plain", how)
    watched = rows_of(
        tmp_path / "watched", how, "observe.interval=1", f"observe.statistics={EVERYTHING}"
    )
    for key in ("loss", "grad_norm", "val_loss"):
        found = [[row[key] for row in rows if key in row] for rows in (plain, watched)]
        assert found[0] == found[1] and found[0]
    observations = [row for row in watched if row["event"] == "observe"]
    assert [row["step"] for row in observations] == [1, 2, 3, 4]
    for row in observations:
        seen = row["observed"]
        # dgrad's w is fprop's transposed: one cast
        assert seen["sites"] == [
            f"0.{linear}.{operand}"
            for linear in ("qkv", "proj", "fc1", "fc2")
            for operand in ("fprop.x", "fprop.w", "dgrad.dy", "wgrad.dy", "wgrad.x")
        ]
        assert all(8 < value < 40 for value in seen["sqnr_db"])
        assert row["worst"].split()[0] in seen["sites"]
        assert sum(seen["scales"][0].values()) == pytest.approx(1, abs=1e-3)
        bias = dict(zip(seen["sites"], seen["draw_bias"], strict=True))
        assert bias["0.fc2.wgrad.dy"] is not None and bias["0.fc2.wgrad.x"] is None
        noise = dict(zip(seen["sites"], seen["gradient_to_noise"], strict=True))
        assert 0.5 < noise["0.fc2.wgrad.dy"] < 100
    assert "oscillation" in observations[-1]["observed"]


def test_a_selection_that_nothing_is_quantized_in_is_refused() -> None:
    with pytest.raises(UserError, match=r"^observe\.blocks"):
        check_run(compose(["precision=nvfp4", "observe.interval=1", "observe.blocks=3"]))
