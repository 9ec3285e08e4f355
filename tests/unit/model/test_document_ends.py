"""Laws of a model whose attention stops at ends of documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp4pretrain.config import compose, plan_of
from fp4pretrain.data import document_places
from fp4pretrain.model import build_model, model_config
from fp4pretrain.model.build import GPT
from fp4pretrain.nn.attention import document_mask
from fp4pretrain.nn.clock import Clock
from fp4pretrain.ops.reference import ReferenceBackend

SMALL = [
    "model=tiny",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=64",
    "precision=bf16",
    "optim.params_dtype=fp32",
    "data.document_mask=true",
]
END = 256


def build(*overrides: str) -> GPT:
    config = compose([*SMALL, *overrides])
    (gpt,), _ = build_model(
        config,
        plan_of(config),
        backend=ReferenceBackend(),
        clock=Clock(config.seed),
        transformer=model_config(config),
    )
    return gpt.eval()


def logits(gpt: GPT, ids_bs: torch.Tensor, *, mask: bool = True, reset: bool = True) -> Any:
    ids_bs = ids_bs.to(torch.cuda.current_device())
    documents, positions = document_places(ids_bs == END)
    if not reset:
        positions = torch.arange(ids_bs.shape[1], device=ids_bs.device).expand_as(ids_bs)
    hidden = document_mask(documents, dtype=torch.float32) if mask else None
    with torch.no_grad():
        return gpt(ids_bs, positions, attention_mask=hidden)


def text(*lengths: int, seed: int) -> torch.Tensor:
    """Documents of random bytes, each with its end."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        part
        for n in lengths
        for part in (torch.randint(256, (n - 1,), generator=generator), torch.tensor([END]))
    ]
    return torch.cat(parts).unsqueeze(0)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("reset", [True, False])
def test_a_change_in_one_document_changes_no_logit_of_the_next(position: str, reset: bool) -> None:
    gpt = build(f"model.position={position}", f"data.reset_positions={reset}")
    ids = text(20, 44, seed=1)
    other = torch.cat([text(20, seed=2), ids[:, 20:]], dim=1)
    one, two = logits(gpt, ids, reset=reset), logits(gpt, other, reset=reset)
    assert not torch.equal(one[:, :19], two[:, :19])
    assert torch.equal(one[:, 20:], two[:, 20:])
    one, two = logits(gpt, ids, mask=False), logits(gpt, other, mask=False)
    assert not torch.equal(one[:, 20:], two[:, 20:])


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_document_has_the_logits_it_has_alone(position: str) -> None:
    """Wherever it lies: with learned positions only where they begin again."""
    gpt = build(f"model.position={position}", "data.reset_positions=true")
    ids = text(20, 44, seed=1)
    together, alone = logits(gpt, ids)[:, 20:], logits(gpt, ids[:, 20:])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_rotary_positions_that_begin_again_are_those_given() -> None:
    """Without the mask they decide which distances attention sees."""
    ids = text(20, 44, seed=1)
    again = logits(build("data.reset_positions=true"), ids, mask=False)
    plain = logits(build(), ids, mask=False)
    assert torch.equal(again[:, :20], plain[:, :20])
    assert float((again[:, 21:] - plain[:, 21:]).abs().max()) > 1e-3
