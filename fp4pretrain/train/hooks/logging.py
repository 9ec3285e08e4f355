"""Rows of numbers to the sinks, with throughput and memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fp4pretrain.observe import Sink, Throughput, flops_per_token, memory_gib, peak_flops
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer

_KEY = "interval"


class Logging(Hook):
    """Writes each ``log_interval``-th training row; other hooks hand theirs to ``write``.

    Its ``loss`` is the mean over the steps since the row before, ``loss_std`` their standard deviation
    (none for a single step); steps without a finite loss are left out unless all are. The losses are
    on the host already, for the guard; those of an unfinished interval are part of a checkpoint.
    Only the main rank has sinks; everywhere the clock of the throughput runs, so that evaluation
    and saving can be left out of it.
    """

    def __init__(self, trainer: Trainer, sink: Sink | None) -> None:
        self._sink = sink
        self._listeners: list[Callable[[Mapping[str, Any]], None]] = []
        self._interval = trainer.config.train.log_interval
        self._logged_tokens = trainer.tokens
        self.throughput = Throughput(
            flops=flops_of(trainer),
            peak=peak_flops(trainer.world.device),
            devices=trainer.world.size,
        )

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return True

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        losses = [*trainer.memory.get(_KEY, []), row["loss"]]
        # JSON, in which a checkpoint keeps them, has no NaN
        trainer.memory[_KEY] = [loss for loss in losses if math.isfinite(loss)]
        if trainer.step % self._interval and trainer.step != trainer.config.train.steps:
            return
        rates = self.throughput.report(trainer.tokens - self._logged_tokens)
        self._logged_tokens = trainer.tokens
        memory = {"memory_gib": memory_gib(trainer.world.device)}
        row = {**row, **summary(trainer.memory[_KEY])}
        trainer.memory[_KEY] = []
        self.write({**row, **rates, **memory, **trainer.counted})

    def after_rollback(self, trainer: Trainer) -> None:
        self._logged_tokens = trainer.tokens
        self.throughput.report(0)  # the steps that are gone count for nothing
        if self._sink is not None:
            self._sink.rewind(trainer.step)

    def listen(self, listener: Callable[[Mapping[str, Any]], None]) -> None:
        """Have every row of this rank shown to ``listener`` too."""
        self._listeners.append(listener)

    def write(self, row: dict[str, Any]) -> None:
        """Hand one row to the sinks, on the main rank, with the time (seconds since 1970)."""
        for listener in self._listeners:
            listener(row)
        if self._sink is not None:
            self._sink.write({**row, "time": round(time.time(), 3)})

    def summarize(self, values: Mapping[str, float]) -> None:
        """Hand the finished run's numbers to the sinks, on the main rank."""
        if self._sink is not None:
            self._sink.summarize(values)

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()


def flops_of(trainer: Trainer) -> int:
    """Training FLOPs of one token of a run's model."""
    m = trainer.config.model
    head_size = m.kv_channels or m.hidden_size // m.num_attention_heads
    return flops_per_token(
        parameters=trainer.parameters,
        input_embedding=0 if m.tie_embeddings else m.vocab_size * m.hidden_size,
        layers=m.num_layers,
        attention_width=m.num_attention_heads * head_size,
        seq_length=m.seq_length,
    )


def summary(losses: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation of an interval's finite losses, as far as there are any."""
    found = {}
    if losses:
        found["loss"] = statistics.fmean(losses)
    if len(losses) > 1:
        found["loss_std"] = statistics.stdev(losses)
    return found
