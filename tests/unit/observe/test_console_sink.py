"""The console says where a run stands, as a bar or as lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fp4pretrain.observe import CompositeSink, ConsoleSink
from fp4pretrain.observe.sink import Row

TRAIN = {
    "event": "train",
    "step": 20,
    "tokens": 20480,
    "loss": 4.25,
    "lr": 1.5e-4,
    "grad_norm": 1.25,
    "tokens_per_second": 12345.6,
    "mfu": None,
    "memory_gib": 1.5,
}


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _sink(clock: _Clock, *, terminal: bool, start_step: int = 0) -> tuple[ConsoleSink, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None)
    sink = ConsoleSink(total_steps=100, start_step=start_step, console=console, clock=clock)
    return sink, stream


def test_without_a_terminal_each_row_is_one_plain_line() -> None:
    clock = _Clock()
    sink, stream = _sink(clock, terminal=False)
    clock.now = 10.0
    sink.write(TRAIN)
    sink.write({"event": "eval", "step": 20, "tokens": 20480, "val_loss": 4.5})
    sink.write({"event": "recipe", "step": 82, "tokens": 83968, "to": "fprop bf16"})
    sink.close()
    assert stream.getvalue().splitlines() == [
        "step 20/100  loss 4.2500  lr 0.00015  grad norm 1.25  12,346 tok/s  eta 0:00:40",
        "step 20/100  val 4.5000",
        "step 82/100  recipe  to fprop bf16",
    ]


@pytest.mark.parametrize(
    ("start_step", "step", "seconds", "eta"),
    [(0, 50, 100.0, "0:01:40"), (40, 50, 100.0, "0:08:20"), (50, 50, 0.0, "?")],
)
def test_the_time_left_counts_the_steps_of_this_process_alone(
    start_step: int, step: int, seconds: float, eta: str
) -> None:
    clock = _Clock()
    sink, stream = _sink(clock, terminal=False, start_step=start_step)
    clock.now = seconds
    sink.write({**TRAIN, "step": step})
    assert stream.getvalue().endswith(f"eta {eta}\n")


def test_the_bar_shows_losses_rate_and_time_left() -> None:
    clock = _Clock()
    sink, stream = _sink(clock, terminal=True)
    clock.now = 10.0
    sink.write({"event": "eval", "step": 10, "tokens": 10240, "val_loss": 4.75})
    sink.write(TRAIN)
    sink.close()
    last = stream.getvalue().splitlines()[-2]  # the last one gives the cursor back
    for part in ("20/100", "loss 4.2500", "val 4.7500", "lr 0.00015", "12,346 tok/s", "0:00:40"):
        assert part in last


def test_a_composite_hands_every_row_to_every_sink_and_closes_them_all() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.rows: list[Row] = []
            self.closed = False
            self.step = -1

        def write(self, row: Row) -> None:
            self.rows.append(row)

        def rewind(self, step: int) -> None:
            self.step = step

        def close(self) -> None:
            self.closed = True

    recorders = [Recorder(), Recorder()]
    composite = CompositeSink(recorders)
    composite.write(TRAIN)
    composite.rewind(3)
    composite.close()
    assert all(one.rows == [TRAIN] and one.step == 3 and one.closed for one in recorders)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_went_back_says_so_in_a_line_and_counts_from_there(terminal: bool) -> None:
    clock = _Clock()
    sink, stream = _sink(clock, terminal=terminal)
    clock.now = 10.0
    sink.write({**TRAIN, "step": 60})
    sink.write(
        {"event": "rollback", "step": 60, "tokens": 1, "count": 1, "reason": "spike", "to_step": 50}
    )
    sink.rewind(50)
    clock.now = 20.0
    sink.write({**TRAIN, "step": 55})
    sink.close()
    text = stream.getvalue()
    assert "step 60/100  rollback  count 1  reason spike  to_step 50" in text
    assert "0:01:30" in text  # 45 steps at 2 s
