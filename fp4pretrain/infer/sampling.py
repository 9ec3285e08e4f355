"""Texts that a model writes: each token drawn from its distribution, keys and values kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp4pretrain.errors import UserError
from fp4pretrain.infer.model import Model
from fp4pretrain.model.decode import Decoder


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    ``temperature`` divides the logits; 0 takes the likeliest. ``top_k``: of the k likeliest alone (0:
    of all). ``top_p``: of the fewest that together have this probability (arXiv:1904.09751).
    ``seed``: equal seeds draw equally. ``max_tokens``: at most so many; the model's length ends a text
    too, and so does the token that ends a document.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, good, cure in (
            ("max-tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or a number above"),
            ("top-k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top-p", 0 < self.top_p <= 1, "a number above 0, up to 1"),
        ):
            if not good:
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name}: {value} is out of range; give {cure}")


def generate(
    model: Model, prompt: str, sampling: Sampling | None = None, *, samples: int = 1
) -> list[str]:
    """``samples`` continuations of ``prompt``, without it; an empty prompt begins a document.

    Raises UserError for a prompt that leaves the model no position.
    """
    ids = model.tokenizer.encode(prompt).tolist() or [model.tokenizer.eod]
    return [
        model.tokenizer.decode(one) for one in generate_ids(model, ids, sampling, samples=samples)
    ]


def generate_ids(
    model: Model, ids: list[int], sampling: Sampling | None = None, *, samples: int = 1
) -> list[list[int]]:
    """``generate`` on token ids. What follows an end of a document is left out, and so is that end.

    ``ids`` may hold an end of a document as their last alone. ``data.reset_positions`` without
    ``data.document_mask`` is not followed: positions count on.
    """
    how = sampling or Sampling()
    room = min(how.max_tokens, model.length - len(ids))
    if room < 1:
        raise UserError(
            f"--prompt: it has {len(ids)} tokens and the model takes model.seq_length={model.length} "
            "with what is generated; give a shorter one"
        )
    generator = torch.Generator(device=model.device).manual_seed(how.seed)
    decoder = Decoder(model.gpt, batch=samples, length=len(ids) + room)
    vocabulary, end = model.run.config.model.vocab_size, model.tokenizer.eod
    logits_bv = decoder(torch.tensor([ids] * samples, device=model.device))[:, :vocabulary]
    data = model.run.config.data
    # with document_mask the first token that is drawn begins a document: it does not see the end before it
    begins = data.document_mask and ids[-1] == end
    drawn: list[torch.Tensor] = []
    ended = torch.zeros(samples, dtype=torch.bool, device=model.device)
    for position in range(room):
        next_b = _draw(logits_bv.float(), how, generator)
        drawn.append(next_b)
        ended |= next_b == end
        if position + 1 == room or bool(ended.all()):
            break
        if not position and begins:
            first = 0 if data.reset_positions else len(ids)
            decoder = Decoder(model.gpt, batch=samples, length=room, first=first)
        logits_bv = decoder(next_b.unsqueeze(1))[:, :vocabulary]
    texts = torch.stack(drawn, dim=1).tolist()
    return [one[: one.index(end)] if end in one else one for one in texts]


def _draw(logits_bv: torch.Tensor, how: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One id a row [b] of logits [b, vocabulary]."""
    if how.temperature == 0:
        return logits_bv.argmax(dim=-1)
    logits_bv = logits_bv / how.temperature
    ordered, places = logits_bv.sort(dim=-1, descending=True)
    weights = ordered.softmax(dim=-1)
    # a token stays where those likelier than it have less than top_p together
    dropped = weights.cumsum(dim=-1) - weights >= how.top_p
    if how.top_k:
        dropped[:, how.top_k :] = True
    weights = weights.masked_fill(dropped, 0.0)
    return places.gather(1, torch.multinomial(weights, 1, generator=generator)).squeeze(1)
