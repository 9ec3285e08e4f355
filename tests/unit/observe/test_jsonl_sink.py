"""metrics.jsonl holds every step once, whatever crashed, resumed or diverged."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from fp4pretrain.errors import UserError
from fp4pretrain.observe import JsonlSink, read_rows


def _row(step: int, event: str = "train") -> dict[str, object]:
    return {"event": event, "step": step, "tokens": 10 * step, "loss": 1.0 / (step + 1)}


def _write(path: Path, steps: range, resume_step: int | None = None) -> None:
    sink = JsonlSink(path, resume_step=resume_step)
    for step in steps:
        sink.write(_row(step))
    sink.close()


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    _write(tmp_path / "run" / "metrics.jsonl", range(1, 6))
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [_row(step) for step in range(1, 6)]


def test_a_row_is_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(_row(1))
    assert read_rows(tmp_path / "metrics.jsonl") == [_row(1)]
    sink.close()


@pytest.mark.parametrize("resume_step", [0, 1, 4, 7, 10, 99])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, resume_step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 11))
    _write(path, range(resume_step + 1, 13), resume_step=resume_step)
    kept = min(resume_step, 10)
    expected = [*range(1, kept + 1), *range(resume_step + 1, 13)]
    assert [row["step"] for row in read_rows(path)] == expected


def test_resuming_keeps_the_evaluation_of_the_checkpointed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for row in (_row(4), _row(4, "eval"), _row(5)):
        sink.write(row)
    sink.close()
    JsonlSink(path, resume_step=4).close()
    assert [row["event"] for row in read_rows(path)] == ["train", "eval"]


def _names(path: Path) -> list[str]:
    return [f"{row['event']} {row['step']}" for row in read_rows(path)]


def _run_that_went_back(path: Path) -> JsonlSink:
    """Steps 1 to 6, of which 5 and 6 were skipped, a failed save, and back to step 4."""
    sink = JsonlSink(path)
    for step in range(1, 7):
        if step > 4:
            sink.write({"event": "skipped", "step": step})
        sink.write(_row(step))
    sink.write({"event": "save_failed", "step": 6})
    sink.write({"event": "rollback", "step": 6, "to_step": 4})
    sink.rewind(4)
    return sink


RECORD = ["skipped 5", "skipped 6", "save_failed 6", "rollback 6"]
STEPS = [f"train {step}" for step in range(1, 8)]


def test_a_run_that_went_back_has_each_step_once_and_the_record_of_why(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = _run_that_went_back(path)
    assert _names(path) == STEPS[:4] + RECORD
    for step in (5, 6, 7):
        sink.write(_row(step))
    sink.close()
    assert _names(path) == STEPS[:4] + RECORD + STEPS[4:]


@pytest.mark.parametrize(
    ("resume_step", "kept"),
    [
        (6, [*STEPS[:4], *RECORD, "train 5", "train 6"]),
        (4, STEPS[:4] + RECORD),
        # before the rollback: the run will skip and go back again; the disk was full only once
        (2, [*STEPS[:2], "save_failed 6"]),
    ],
)
def test_a_resumed_run_keeps_the_record_that_it_will_not_write_again(
    tmp_path: Path, resume_step: int, kept: list[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = _run_that_went_back(path)
    for step in (5, 6):
        sink.write(_row(step))
    sink.write({"event": "skipped", "step": 7})
    sink.close()
    JsonlSink(path, resume_step=resume_step).close()
    assert _names(path) == kept


def test_a_half_written_row_is_dropped_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    with path.open("a") as file:
        file.write('{"event": "train", "step": 4, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    _write(path, range(4, 6), resume_step=3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5]


def test_a_new_run_keeps_the_records_of_earlier_ones_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for last in (2, 3, 4):
        _write(path, range(1, last + 1))
    assert len(read_rows(path)) == 4
    assert len(read_rows(tmp_path / "metrics.1.jsonl")) == 2
    assert len(read_rows(tmp_path / "metrics.2.jsonl")) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_loss_is_strict_json_and_comes_back_a_float(
    tmp_path: Path, value: float
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write({"step": 1, "loss": value, "mfu": None})
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    row = read_rows(path)[0]
    assert row["mfu"] is None
    assert str(row["loss"]) == str(value)


def test_tensors_and_numpy_numbers_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(
        {
            "step": np.int64(3),
            "loss": torch.tensor(2.5),
            "lr": np.float32(0.5),
            "layers": {"0": torch.tensor(float("nan"))},
        }
    )
    sink.close()
    expected = {"step": 3, "loss": 2.5, "lr": 0.5, "layers": {"0": "NaN"}}
    assert json.loads(path.read_text()) == expected


@pytest.mark.parametrize("line", ["not json", "3", "[1, 2]"])
def test_a_broken_line_names_itself(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_rows(path)


def test_a_full_disk_delays_rows_and_loses_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit on a file's size stands for the disk: the kernel refuses the write half-way."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write({"step": 1, "loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        sink.write({"step": 2, "loss": 2.0})
        sink.write({"step": 3, "loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("rows wait in memory") == 1
    assert [row["step"] for row in read_rows(path)] == [1]
    sink.write({"step": 4, "loss": 4.0})
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
