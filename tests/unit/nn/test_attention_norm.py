"""Norm and core attention against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from fp4pretrain.nn.attention import CoreAttention, document_mask
from fp4pretrain.nn.norm import Norm

BF16_ROUNDING = 2.0**-8


def config(**changes: Any) -> TransformerConfig:
    base = dict(num_layers=1, hidden_size=64, num_attention_heads=4, params_dtype=torch.bfloat16)
    return TransformerConfig(**base | changes)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=torch.cuda.current_device()).to(dtype)


def norm_formula(x: torch.Tensor, norm: Norm, kind: str) -> torch.Tensor:
    if kind == "LayerNorm":
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return scaled * norm.weight.double() + norm.bias.double()
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_and_its_gradients_are_the_formula(kind: str, dtype: torch.dtype) -> None:
    norm = Norm(config(normalization=kind, params_dtype=dtype), 64, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(draw(64))
        if norm.bias is not None:
            norm.bias.copy_(draw(64))
    x = (draw(8, 2, 64, dtype=dtype) * 30).requires_grad_()
    dy = draw(8, 2, 64, dtype=dtype)
    y = norm(x)
    y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    y64 = norm_formula(x64, norm, kind)
    y64.backward(dy.double())
    assert y.dtype == dtype
    # a few roundings of the output's type: statistics in BF16 would cost ten times as much
    relative = 3 * (BF16_ROUNDING if dtype == torch.bfloat16 else 2.0**-22)
    for ours, exact in ((y, y64), (x.grad, x64.grad)):
        assert float((ours.double() - exact).norm() / exact.norm()) < relative
        assert float((ours.double() - exact).abs().max() / exact.abs().max()) < relative


@pytest.mark.parametrize(
    "kind, names", [("RMSNorm", ["weight"]), ("LayerNorm", ["weight", "bias"])]
)
@pytest.mark.parametrize("sequence", [False, True])
def test_norm_parameters_say_whether_their_gradients_are_partial_sums(
    kind: str, names: list[str], sequence: bool
) -> None:
    parallel = dict(tensor_model_parallel_size=2) if sequence else {}
    norm = Norm(config(normalization=kind, sequence_parallel=sequence, **parallel), 64)
    found = dict(norm.named_parameters())
    assert list(found) == names
    assert all(p.sequence_parallel is sequence for p in found.values())
    assert (norm.weight == 1).all()


def attention(**changes: Any) -> CoreAttention:
    dropout = changes.pop("attention_dropout", 0.0)
    scale = changes.pop("softmax_scale", None)
    softcap = changes.pop("softcap", None)
    return CoreAttention(
        config(attention_dropout=dropout, **changes),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=scale,
        softcap=softcap,
    )


def attention_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """q [s, b, h, d], k and v [s, b, g, d]: consecutive h / g query heads share a group."""
    s, b, h, d = q.shape
    share = h // k.shape[2]
    out = torch.empty(s, b, h, d, dtype=torch.float64, device=q.device)
    future = torch.ones(s, s, device=q.device).triu(1).bool()
    for i in range(b):
        for j in range(h):
            scores = q[:, i, j].double() @ k[:, i, j // share].double().t() * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            out[:, i, j] = weights @ v[:, i, j // share].double()
    return out.reshape(s, b, h * d)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_attention_and_its_gradients_are_the_formula(
    heads: int, groups: int, scale: float | None, softcap: float | None
) -> None:
    """The scores reach 4: capped at 1.5 they are others by far."""
    s, b, d = 40, 2, 16
    q, k, v = (draw(s, b, n, d).requires_grad_() for n in (heads, groups, groups))
    dy = draw(s, b, heads * d)
    out = attention(softmax_scale=scale, softcap=softcap)(q, k, v, None)
    out.backward(dy)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = attention_formula(*exact_inputs, scale or d**-0.5, softcap)
    exact.backward(dy.double())
    assert out.shape == (s, b, heads * d) and out.dtype == torch.bfloat16
    pairs = [
        (out, exact),
        *((t.grad, e.grad) for t, e in zip((q, k, v), exact_inputs, strict=True)),
    ]
    for ours, truth in pairs:
        assert float((ours.double() - truth).norm() / truth.norm()) < 2 * BF16_ROUNDING


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "capped"])
def test_attention_sees_no_future(softcap: float | None) -> None:
    q, k, v = (draw(32, 1, 2, 16) for _ in range(3))
    before = attention(softcap=softcap)(q, k, v)
    k[20:], v[20:] = 7.0, -7.0
    after = attention(softcap=softcap)(q, k, v)
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:], after[20:])


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_over_documents_is_that_of_each_alone(groups: int, softcap: float | None) -> None:
    """Outputs and gradients of documents side by side, against each by itself in float64."""
    heads, d, lengths = 4, 16, [[7, 20, 13], [40]]
    s = sum(lengths[0])
    numbers = [[i for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    documents = torch.tensor(numbers, device=torch.cuda.current_device())
    q, k, v = (draw(s, 2, n, d).requires_grad_() for n in (heads, groups, groups))
    dy = draw(s, 2, heads * d)
    mask = document_mask(documents, dtype=torch.bfloat16)
    out = attention(softcap=softcap)(q, k, v, mask)
    out.backward(dy)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    rows = []
    for row, parts in enumerate(lengths):
        pieces = zip(*(t[:, row : row + 1].split(parts) for t in exact_inputs), strict=True)
        rows.append(torch.cat([attention_formula(*p, d**-0.5, softcap) for p in pieces]))
    exact = torch.cat(rows, dim=1)
    exact.backward(dy.double())
    pairs = [
        (out, exact),
        *((t.grad, e.grad) for t, e in zip((q, k, v), exact_inputs, strict=True)),
    ]
    for ours, truth in pairs:
        assert float((ours.double() - truth).norm() / truth.norm()) < 2 * BF16_ROUNDING


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "capped"])
def test_attention_sees_no_other_document(softcap: float | None) -> None:
    q, k, v = (draw(32, 1, 2, 16) for _ in range(3))
    documents = (torch.arange(32, device=q.device) >= 20).long().unsqueeze(0)
    mask = document_mask(documents, dtype=q.dtype)
    before = attention(softcap=softcap)(q, k, v, mask)
    for tensor in (q, k, v):
        tensor[:20] = 7.0
    after = attention(softcap=softcap)(q, k, v, mask)
    assert torch.equal(before[20:], after[20:])
    assert not torch.equal(before[:20], after[:20])


def test_attention_keeps_no_score_matrix() -> None:
    """What backward needs grows with the length, not with its square."""

    def saved(s: int) -> int:
        q, k, v = (draw(s, 1, 2, 16).requires_grad_() for _ in range(3))
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            attention()(q, k, v)
        return sum(sizes.values())

    assert 0 < saved(1024) <= 2.2 * saved(512)


def test_attention_dropout_draws_from_the_tensor_parallel_ranks_own_stream() -> None:
    """Ranks hold different heads, but their default generators are alike."""
    q, k, v = (draw(16, 1, 2, 16) for _ in range(3))
    module = attention(attention_dropout=0.5)
    state = torch.cuda.get_rng_state()
    first, second = module(q, k, v), module(q, k, v)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(q, k, v), attention()(q, k, v))
