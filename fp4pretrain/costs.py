"""Where a recipe's FLOPs go: the share of them in each precision, of one token forward and backward.

A linear [n, k] costs 2 n k FLOPs a token in each of its three GEMMs, the two attention products of a
layer 12 x attention width x sequence length together (as ``observe.throughput`` counts them), in BF16.
Norms, embedding and optimizer are left out. A GEMM counts as its wider operand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fp4pretrain.config import ModelConfig
from fp4pretrain.numerics.formats import FORMATS
from fp4pretrain.precision import GEMMS, Plan
from fp4pretrain.precision.rules import HEAD, QKV, QKV_PARTS, qkv_rows

_BF16 = 16


def flop_shares(
    plan: Plan, model: ModelConfig, *, holding: Mapping[str, bool] | None = None
) -> dict[str, float]:
    """Share of the FLOPs by precision (``4 bits``, ``BF16``); they add up to 1, the narrowest first.

    ``holding``: which rules hold, by name; without it those that are not timed.
    """
    head_size = model.kv_channels or model.hidden_size // model.num_attention_heads
    width = model.num_attention_heads * head_size
    found: Counter[int] = Counter()
    for layer, linear in plan.linears():
        n, k = _shape(linear, model, head_size=head_size)
        recipe = plan.with_rules(layer, linear, holding)
        for gemm in GEMMS:
            bits = max(FORMATS[spec.format].element.bits for spec in recipe.gemm(gemm).specs)
            found[bits] += 2 * n * k
    found[_BF16] += 12 * model.num_layers * width * model.seq_length
    total = sum(found.values())
    return {
        "BF16" if bits == _BF16 else f"{bits} bits": found[bits] / total for bits in sorted(found)
    }


def _shape(linear: str, model: ModelConfig, *, head_size: int) -> tuple[int, int]:
    """(output, input) features of a linear, or of a part of one, by its global name."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    heads = model.num_attention_heads
    if linear == QKV or linear in QKV_PARTS:
        groups = model.num_query_groups or heads
        return qkv_rows(linear, heads=heads, groups=groups, head_size=head_size), hidden
    gate = 2 if model.activation == "swiglu" else 1
    width = heads * head_size
    shapes = {
        "self_attention.linear_proj": (hidden, width),
        "mlp.linear_fc1": (gate * ffn, hidden),
        "mlp.linear_fc2": (hidden, ffn),
        HEAD: (model.vocab_size, hidden),
    }
    return shapes[linear]
