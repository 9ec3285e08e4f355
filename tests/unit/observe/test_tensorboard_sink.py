"""Event files, read back as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp4pretrain.errors import UserError
from fp4pretrain.observe import About, Table, tensorboard_sink
from fp4pretrain.observe.tensorboard_sink import TensorBoardSink, check_installed

pytest.importorskip("tensorboard")
ABOUT = About(("nvfp4", "H16"), {"recipe": Table(("GEMM", "format"), [("fprop", "nvfp4")])})


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in read(folder).Scalars(key)]


def train(sink: TensorBoardSink, steps: range, loss: float) -> None:
    for step in steps:
        sink.write({"event": "train", "step": step, "tokens": 10 * step, "loss": loss, "mfu": None})


def test_a_resumed_run_has_each_point_once(tmp_path: Path) -> None:
    """Steps 3 and 4 were trained twice; the second time counts. Tables are told once."""
    for resume, steps, loss in ((None, range(1, 5), 2.0), (20, range(3, 6), 1.0)):
        sink = TensorBoardSink(tmp_path, ABOUT, resume)
        train(sink, steps, loss)
        sink.close()
    expected = [(10, 2.0), (20, 2.0), (30, 1.0), (40, 1.0), (50, 1.0)]
    assert points(tmp_path, "loss") == expected
    found = read(tmp_path)
    assert found.Tags()["scalars"] == ["step", "loss"]  # what is not known is no point
    (text,) = found.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "|GEMM|format|\n|---|---|\n|fprop|nvfp4|"


def test_a_run_that_goes_back_keeps_why(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, ABOUT)
    train(sink, range(1, 5), 2.0)
    sink.write({"event": "rollback", "step": 4, "tokens": 40, "count": 1, "reason": "spike"})
    sink.rewind(2)
    train(sink, range(3, 5), 1.0)
    sink.close()
    assert points(tmp_path, "loss") == [(10, 2.0), (20, 2.0), (30, 1.0), (40, 1.0)]
    assert points(tmp_path, "events/rollback") == [(40, 1.0)]


def test_another_attempt_in_the_folder_begins_anew(tmp_path: Path) -> None:
    for loss in (2.0, 1.0):
        sink = TensorBoardSink(tmp_path, ABOUT)
        train(sink, range(1, 3), loss)
        sink.close()
    assert points(tmp_path, "loss") == [(10, 1.0), (20, 1.0)]


def test_scales_are_a_histogram_by_octave_and_the_summary_is_a_row_of_hparams(
    tmp_path: Path,
) -> None:
    sink = TensorBoardSink(tmp_path, ABOUT)
    observed = {
        "sites": ["0.fc1.fprop.x", "1.fc1.fprop.x"],
        "scales": [{"-2": 0.25, "0": 0.75}, {"zero": 0.5, "0": 0.5}],
    }
    row = {"event": "observe", "step": 1, "tokens": 7, "observe/sqnr_db/fprop.x": 21.0}
    sink.write({**row, "worst": "0.fc1.fprop.x 20.0 dB", "observed": observed})
    sink.summarize({"final/gap_percent": 2.5})
    sink.close()
    (found,) = read(tmp_path).Histograms("observe/scales/fprop.x")
    value = found.histogram_value
    assert found.step == 7 and value.num == pytest.approx(1.5)
    assert value.bucket_limit == [-1, 0, 1] and value.bucket == [0.25, 0.0, 1.25]
    assert value.sum == pytest.approx(0.25 * -1.5 + 1.25 * 0.5)
    assert points(tmp_path, "observe/sqnr_db/fprop.x") == [(7, 21.0)]
    assert points(tmp_path, "final/gap_percent") == [(7, 2.5)]


@pytest.mark.parametrize("where", ["add_scalar", "add_hparams", "close"])
def test_a_full_disk_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    sink = TensorBoardSink(tmp_path, ABOUT)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    setattr(sink._writer, where, full)
    train(sink, range(1, 4), 1.0)
    sink.summarize({"final/gap_percent": 2.5})
    sink.close()
    assert capsys.readouterr().out == (
        "tensorboard: stopped (No space left on device); metrics.jsonl goes on\n"
    )


def test_a_missing_package_is_one_line_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard_sink, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"logging\.tensorboard: .*pip install 'fp4pretrain\[tensor"
    ):
        check_installed()
