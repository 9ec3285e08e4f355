"""When a step is rehearsed, captured, replayed or computed as ever, and which batches it reads.

Capture itself needs a GPU (tests/gpu/test_replay_cuda.py): here it is a stand-in that runs the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.ops import watching
from fp4pretrain.ops.engine_backend import EngineBackend
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.parallel import groups
from fp4pretrain.parallel.groups import leave
from fp4pretrain.train import replay
from fp4pretrain.train.replay import Replays, why_not

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], None),
        (["model.hidden_dropout=0.1"], "dropout"),
        (["data.document_mask=true"], "document_mask"),
        (["precision.fprop.x.amax=held", "precision.fprop.x.amax_steps=4"], "amax=held"),
        (["precision=averis", "precision.dgrad.dy.rounding=stochastic"], "split"),
    ],
)
def test_what_cannot_be_captured_is_said(overrides: list[str], reason: str | None) -> None:
    config = compose(overrides)
    backend: Any = SimpleNamespace(name="triton")
    found = why_not(config, plan_of(config), backend, device=CUDA)
    assert found is None if reason is None else reason in str(found)


def test_neither_a_cpu_nor_backends_that_draw_otherwise_capture() -> None:
    config = compose([])
    plan, backend = plan_of(config), ReferenceBackend()
    assert "reference" in str(why_not(config, plan, backend, device=CUDA))
    assert "never captured" in str(why_not(config, plan, EngineBackend(), device=CUDA))
    cpu = torch.device("cpu")
    assert "NVIDIA GPU" in str(why_not(config, plan, backend, device=cpu))


class Lab:
    """A trainer of nothing: what each step did, and the numbers of the batches it read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, steps: int = 100) -> None:
        self.did: list[tuple[str, list[int]]] = []
        self.captures = 0
        self.released = 0
        self.problem: Exception | None = None
        self.recipes = [object()]
        self.trainer: Any = SimpleNamespace(
            step=0,
            config=SimpleNamespace(train=SimpleNamespace(steps=steps, graph="auto")),
            layout=SimpleNamespace(microbatches=2),
            world=SimpleNamespace(device=torch.device("cpu"), is_main=True, size=1),
            clock=SimpleNamespace(seed=1, step=0, draws=None),
            binding=SimpleNamespace(recipes=lambda: self.recipes, switches=0),
            optimizer=SimpleNamespace(fill_learning_rates=lambda: None),
            asked=SimpleNamespace(fill=lambda: None),
        )
        lab = self

        def forward_backward(trainer: Any, iterators: Any) -> None:
            how = "plain" if trainer.clock.draws is None else "rehearsed"
            lab.did.append((how, numbers(iterators[0])))

        class Captured:
            def __init__(self, trainer: Any, recipes: Any, draws: Any, inputs: Any) -> None:
                if lab.problem is not None:
                    raise lab.problem
                lab.captures += 1
                self.recipes, self.inputs = recipes, inputs
                self.prepared: list[int] = []

            def release(self) -> None:
                lab.released += 1

            def prepare(self, seed: int, step: int) -> None:
                self.prepared.append(step)

            def replay(self, trainer: Any) -> str:
                lab.did.append(("replayed", numbers(self.inputs.iterators()[0])))
                return "outcome"

        monkeypatch.setattr(replay, "forward_backward", forward_backward)
        monkeypatch.setattr(replay, "update", lambda trainer, loss: "outcome")
        monkeypatch.setattr(replay, "_Captured", Captured)

    def run(self, replays: Replays, iterators: Any, steps: int) -> None:
        for _ in range(steps):
            assert replays.step(self.trainer, iterators) == "outcome"
            self.trainer.clock.step += 1


def numbers(iterator: Any) -> list[int]:
    return [int(batch["tokens"]) for batch in iterator]


def counted(start: int = 0) -> list[Iterator[dict[str, torch.Tensor]]]:
    """Batches that say their number, on one model chunk."""
    return [iter([{"tokens": torch.tensor(n)} for n in range(start, 1000)])]


def test_steps_are_rehearsed_captured_and_replayed_in_the_order_of_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab, replays = Lab(monkeypatch), Replays(None)
    lab.run(replays, counted(), 4)
    assert lab.did == [
        ("rehearsed", [0, 1]), ("replayed", [2, 3]), ("replayed", [4, 5]), ("replayed", [6, 7]),
    ]  # fmt: skip
    assert lab.captures == 1


def test_another_recipe_and_forgotten_memory_begin_with_a_rehearsal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab, replays, iterators = Lab(monkeypatch), Replays(None), counted()
    lab.run(replays, iterators, 2)
    lab.recipes = [object()]
    lab.run(replays, iterators, 2)
    replays.forget()
    lab.run(replays, iterators, 1)
    assert [how for how, _ in lab.did] == ["rehearsed", "replayed"] * 2 + ["rehearsed"]
    assert [n for _, read in lab.did for n in read] == list(range(10))


def test_a_watched_step_runs_as_ever_and_misses_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, replays, iterators = Lab(monkeypatch), Replays(None), counted()
    lab.run(replays, iterators, 2)
    watching.attach(lambda seen: None)
    try:
        lab.run(replays, iterators, 1)
    finally:
        watching.detach()
    lab.run(replays, iterators, 1)
    assert [how for how, _ in lab.did] == ["rehearsed", "replayed", "plain", "replayed"]
    assert [n for _, read in lab.did for n in read] == list(range(8))


def test_a_run_that_goes_elsewhere_in_its_data_drops_what_was_read_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab, replays = Lab(monkeypatch), Replays(None)
    lab.run(replays, counted(), 3)
    lab.run(replays, counted(100), 1)
    assert lab.did[-1] == ("replayed", [100, 101])


def test_a_capture_that_fails_is_said_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, replays = Lab(monkeypatch), Replays(None)
    lab.problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    lab.run(replays, counted(), 4)
    assert [how for how, _ in lab.did] == ["rehearsed", "plain", "plain", "plain"]
    assert [n for _, read in lab.did for n in read][:4] == [0, 1, 2, 3]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "CUDA out of memory. Tried to allocate 2 GiB" in printed[0]
    lab.trainer.config.train.graph = "always"
    replays = Replays(None)
    lab.run(replays, counted(), 1)
    with pytest.raises(UserError, match="train.graph: CUDA out of memory"):
        replays.step(lab.trainer, counted(2))


def test_a_capture_that_failed_on_another_rank_is_given_up_here_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, replays = Lab(monkeypatch), Replays(None)
    monkeypatch.setattr(replay, "_everywhere", lambda mine, world: False)
    lab.run(replays, counted(), 3)
    assert [how for how, _ in lab.did] == ["rehearsed", "plain", "plain"]
    assert (lab.captures, lab.released) == (1, 1)
    assert "another rank" in capsys.readouterr().out


def test_a_switch_of_another_ranks_linears_begins_with_a_rehearsal_here_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab, replays, iterators = Lab(monkeypatch), Replays(None), counted()
    lab.run(replays, iterators, 2)
    lab.trainer.binding.switches += 1
    lab.run(replays, iterators, 2)
    assert [how for how, _ in lab.did] == ["rehearsed", "replayed"] * 2


def test_leaving_the_groups_ends_captured_graphs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, replays = Lab(monkeypatch), Replays(None)
    lab.run(replays, counted(), 2)
    monkeypatch.setattr(
        groups, "_destroy_subgroups", lambda: lab.did.append((f"{lab.released} released", []))
    )
    leave()
    assert lab.did[-1] == ("1 released", [])


def test_nothing_is_read_past_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, replays, iterators = Lab(monkeypatch, steps=3), Replays(None), counted()
    lab.run(replays, iterators, 3)
    assert numbers(iterators[0])[0] == 6


def test_without_capture_steps_read_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, replays, iterators = Lab(monkeypatch), Replays("because"), counted()
    assert replays.step(lab.trainer, [islice(iterators[0], 2)]) == "outcome"
    assert lab.did == [("plain", [0, 1])]
