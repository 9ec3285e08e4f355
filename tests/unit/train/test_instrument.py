"""What a run measures: one validation loss whatever the batch, rows that lose no loss, a first update."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.config import compose
from fp4pretrain.observe import JsonlSink
from fp4pretrain.train import step
from fp4pretrain.train.hooks import Evaluation, Logging
from fp4pretrain.train.hooks.logging import summary
from fp4pretrain.train.optimizer import build_schedule
from fp4pretrain.train.step import evaluate, evaluation_sampler
from fp4pretrain.train.trainer import Trainer


@pytest.fixture
def valid(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A set of 37 sequences of which the last is half masked."""

    class Few(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 37

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            sample = dict(trainer.data.train[number])
            if number == 36:
                sample["loss_mask"] = (torch.arange(32) < 16).float()
            return sample

    found = Few()
    monkeypatch.setattr(trainer, "data", replace(trainer.data, valid={"validation": found}))
    return found


def by_hand(trainer: Trainer, valid: Any) -> float:
    """Sequence by sequence, summed over tokens in float64."""
    total, tokens = 0.0, 0.0
    (chunk,) = trainer.chunks
    chunk.eval()
    for number in range(len(valid)):
        one = {key: value.unsqueeze(0) for key, value in valid[number].items()}
        with torch.no_grad():
            loss = chunk(
                one["tokens"], one["position_ids"], attention_mask=None, labels=one["labels"]
            )
        total += float((loss.double() * one["loss_mask"]).sum())
        tokens += float(one["loss_mask"].sum())
    chunk.train()
    return total / tokens


@pytest.mark.parametrize("tokens", [32, 5 * 32, 37 * 32, 10**6])
def test_validation_loss_is_the_mean_over_all_tokens_whatever_the_batch(
    trainer: Trainer, valid: Any, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Batches that do not divide the set too: BF16 sums inside the model are all that may differ."""
    monkeypatch.setattr(step, "_EVALUATION_TOKENS", tokens)
    assert evaluate(trainer, "validation").loss == pytest.approx(by_hand(trainer, valid), rel=1e-4)


def test_the_batch_of_an_evaluation_is_no_choice_of_the_run(
    trainer: Trainer, valid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.micro_batch, data parallelism and pipelines change neither the microbatches nor their order,
    so a recipe that scales by a whole microbatch has one validation loss too."""
    first = evaluate(trainer, "validation").loss
    read: set[tuple[int, ...]] = set()
    config = trainer.config
    for micro_batch, ranks, virtual in ((1, 1, None), (8, 2, None), (4, 3, 2)):
        t = replace(config.train, micro_batch=micro_batch, global_batch=24)
        p = replace(config.parallel, virtual_pipeline=virtual, pipeline=2 if virtual else 1)
        monkeypatch.setattr(trainer, "config", replace(config, train=t, parallel=p))
        rows: list[list[int]] = []
        for rank in range(ranks):
            world = replace(trainer.world, data_rank=rank, data_size=ranks)
            monkeypatch.setattr(trainer, "world", world)
            rows += list(evaluation_sampler(trainer, sequences=1000))
        monkeypatch.setattr(trainer, "world", replace(world, data_rank=0, data_size=1))
        real = sorted(row for row in rows if row[0] < 1000)
        read.add(tuple(tuple(row) for row in real))
        monkeypatch.setattr(trainer, "config", replace(config, train=t))
        assert evaluate(trainer, "validation").loss == first
    assert len(read) == 1


def test_parts_of_a_validation_set_are_neighbouring_sequences(
    trainer: Trainer, valid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is what an evaluation of its sequences alone gives, and together they are the whole."""
    found = evaluate(trainer, "validation")
    assert len(found.parts) == min(32, len(valid))
    numbers = [number * len(found.parts) // len(valid) for number in range(len(valid))]
    for part in (0, len(found.parts) - 1):
        own = [valid[n] for n, place in enumerate(numbers) if place == part]
        monkeypatch.setattr(trainer, "data", replace(trainer.data, valid={"validation": own}))
        alone = evaluate(trainer, "validation").loss
        assert found.parts[part] == pytest.approx(alone, rel=1e-4)
    assert len(set(found.parts)) > 1


def test_every_named_set_is_logged(
    trainer: Trainer, valid: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = replace(trainer.data, valid={"web": valid, "code": [valid[3]]})
    monkeypatch.setattr(trainer, "data", other)
    monkeypatch.setattr(trainer, "step", trainer.config.train.steps)
    logging = Logging(trainer, JsonlSink(tmp_path / "metrics.jsonl"))
    Evaluation(logging).after_step(trainer, {})
    logging.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["val_loss"] == row["val_loss/web"] == evaluate(trainer, "web").loss
    assert row["val_loss/code"] == evaluate(trainer, "code").loss != row["val_loss"]
    assert row["time"] > 1.7e9


class Rows:
    """A sink in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: Any) -> None:
        self.rows.append(dict(row))

    def rewind(self, at: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= at]

    def close(self) -> None: ...


def test_a_row_has_the_mean_of_its_interval_and_its_spread(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every loss, also over a restart or a way back in the middle of an interval."""
    config = trainer.config
    monkeypatch.setattr(
        trainer, "config", replace(config, train=replace(config.train, log_interval=4, steps=10))
    )
    monkeypatch.setattr(trainer, "memory", {})
    losses = [3.0, 2.5, math.nan, 2.0, 1.5, 1.75, 1.25, 1.0, 0.5, 0.75]
    rows = Rows()
    logging = Logging(trainer, rows)
    stored: dict[int, str] = {}

    def run(first: int, last: int) -> None:
        for number in range(first, last):
            monkeypatch.setattr(trainer, "step", number + 1)
            row = {
                "event": "train",
                "step": number + 1,
                "tokens": 8 * number,
                "loss": losses[number],
            }
            logging.after_step(trainer, row)
            stored[number + 1] = json.dumps(trainer.memory, allow_nan=False)

    run(0, 7)
    monkeypatch.setattr(trainer, "memory", json.loads(stored[6]))  # a checkpoint of step 6
    logging = Logging(trainer, rows)
    run(6, 10)
    assert [row["step"] for row in rows.rows] == [4, 8, 10]
    for row, part in zip(rows.rows, ([3.0, 2.5, 2.0], losses[4:8], losses[8:10]), strict=True):
        assert row["loss"] == statistics.fmean(part)
        assert row["loss_std"] == pytest.approx(statistics.stdev(part))


def test_an_interval_without_a_finite_loss_says_so() -> None:
    assert summary([]) == {}  # the row keeps the step's own NaN
    assert summary([2.0]) == {"loss": 2.0}
    assert summary([2.0, 4.0]) == {"loss": 3.0, "loss_std": pytest.approx(math.sqrt(2))}


@pytest.mark.parametrize(
    ("overrides", "warmup"),
    [
        (["optim.warmup=0.1"], 10),
        (["optim.warmup=25"], 25),
        (["optim.warmup=12.8K"], 25),  # 512 tokens a step
        (["optim.warmup=0"], 0),
        (["optim.warmup=1"], 1),
        (["optim=cosine", "optim.warmup=20"], 20),
        (["train.tokens=51200", "train.global_batch=2", "optim.warmup=0.2"], 20),
    ],
)
def test_warmup_is_linear_and_no_update_is_without_a_rate(
    overrides: list[str], warmup: int
) -> None:
    base = [] if "train.tokens=51200" in overrides else ["train.steps=100"]
    config = compose([*base, "train.micro_batch=2", "train.global_batch=2", *overrides])
    assert config.train.steps == 100

    class Optimizer:
        param_groups = [{"lr": 0.0, "default_config": True}]  # noqa: RUF012

    optimizer = Optimizer()
    # a stand-in with the parameter groups that a schedule reads
    schedule = build_schedule(config, optimizer)  # type: ignore[arg-type]  # a stand-in
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    lr = config.optim.lr
    assert rates[: warmup + 1] == pytest.approx(
        [lr * (i + 1) / (warmup + 1) for i in range(warmup + 1)]
    )
    assert min(rates) > 0
    assert max(rates) == pytest.approx(lr)
    assert rates[-1] < 0.2 * lr


def test_a_model_brings_its_papers_training_and_a_choice_overrides_it() -> None:
    b = compose(["model=gpt_1_3b"])
    assert (b.optim.lr, b.optim.min_lr, b.optim.schedule) == (2e-4, 2e-5, "cosine")
    assert (b.train.global_batch, b.model.seq_length) == (1024, 2048)
    assert b.train.steps * 1024 * 2048 == pytest.approx(42e9, rel=1e-3)
    c = compose(["model=llama3_8b"])
    assert (c.optim.eps, c.optim.warmup, c.train.global_batch) == (1e-5, 64, 32)
    chosen = compose(["model=gpt_1_3b", "optim=wsd", "train.global_batch=64", "optim.eps=1e-6"])
    assert (chosen.optim.schedule, chosen.train.global_batch, chosen.optim.eps) == ("wsd", 64, 1e-6)
    assert chosen.train.steps == b.train.steps
    assert compose(["model=gpt_1_3b", "optim.lr=1e-5", "optim.min_lr=0"]).optim.lr == 1e-5
    assert compose([]).optim.lr == 1e-3
    ours = compose(["model=gpt_10m"])
    assert ours.train.steps * ours.train.global_batch * ours.model.seq_length == pytest.approx(
        100e6, rel=1e-3
    )


def test_document_masks_change_what_spans_documents_alone(
    trainer: Trainer, valid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of one document give the unmasked losses bit for bit; those of two give others."""
    plain = evaluate(trainer, "validation")
    read = type(valid).__getitem__

    def cut(at: int) -> None:
        def marked(self: Any, number: int) -> dict[str, torch.Tensor]:
            return {**read(self, number), "documents": (torch.arange(32) >= at).long()}

        monkeypatch.setattr(type(valid), "__getitem__", marked)

    cut(32)
    assert evaluate(trainer, "validation") == plain
    cut(20)
    assert abs(evaluate(trainer, "validation").loss / plain.loss - 1) > 1e-5


def test_parts_without_a_token_in_the_loss_are_left_out(
    trainer: Trainer, valid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = type(valid).__getitem__

    def masked(self: Any, number: int) -> dict[str, torch.Tensor]:
        sample = read(self, number)
        return {**sample, "loss_mask": sample["loss_mask"] * (number >= 10)}

    monkeypatch.setattr(type(valid), "__getitem__", masked)
    found = evaluate(trainer, "validation")
    assert math.isfinite(found.loss)
    assert 20 < len(found.parts) < 28
    assert all(map(math.isfinite, found.parts))
