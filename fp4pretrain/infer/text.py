"""The loss of a model on text: nats a token, perplexity, bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fp4pretrain.errors import UserError
from fp4pretrain.infer.model import Model

_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class TextLoss:
    """Sums over a text: ``nats`` of surprise, ``tokens`` predicted, ``bytes`` of UTF-8, ``documents``."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    def values(self) -> dict[str, float]:
        """What is recorded: loss, perplexity, bits_per_byte."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(self.loss),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
        }


def text_loss(model: Model, documents: Iterable[str], *, key: str = "--text") -> TextLoss:
    """Every token of every document is predicted once, from what stands before it in its window.

    Windows have the model's length and do not overlap, as in training; the first begins with the end
    of a document. Raises UserError (of the option ``key``) where there is no token.
    """
    count = size = tokens = 0
    nats = 0.0

    def windows() -> Iterator[list[int]]:
        nonlocal count, size, tokens
        for text in documents:
            count, size = count + 1, size + len(text.encode())
            ids = model.tokenizer.encode(text).tolist()
            tokens += len(ids)
            yield from windows_of([model.tokenizer.eod, *ids], model.length)

    for batch in _batches(windows(), max(1, _BATCH_TOKENS // model.length)):
        nats += sum(-float(found.sum()) for found in log_probabilities(model, batch))
    if not tokens:
        raise UserError(f"{key}: there is no text in it; give a file that has some")
    return TextLoss(nats, tokens, size, count)


def windows_of(ids: list[int], length: int) -> list[list[int]]:
    """Ids in parts of ``length`` + 1, each beginning with the last of the one before: each id but the
    first is predicted in one of them."""
    return [ids[at : at + length + 1] for at in range(0, len(ids) - 1, length)]


def log_probabilities(model: Model, windows: list[list[int]]) -> list[torch.Tensor]:
    """Of each window's ids but the first, given those before them: FP32 [ids - 1], on the CPU.

    Windows of unequal lengths run in one batch: what pads the shorter ones stands behind them.
    """
    longest = max(map(len, windows))
    end = model.tokenizer.eod
    ids = torch.tensor([one + [end] * (longest - len(one)) for one in windows], device=model.device)
    logits = model.logits(ids[:, :-1])
    found = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [row[: len(one) - 1].cpu() for row, one in zip(found, windows, strict=True)]


def _batches(windows: Iterator[list[int]], size: int) -> Iterator[list[list[int]]]:
    waiting: list[list[int]] = []
    for one in windows:
        waiting.append(one)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
