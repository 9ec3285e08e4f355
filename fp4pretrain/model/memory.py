"""What a run's state takes on one rank, known before anything is allocated.

Weights, FP32 gradients, FP32 masters and Adam's two moments: exact but for the few bytes that pad
buffers. Activations come on top; they depend on recipe, recompute and schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp4pretrain.config import ModelConfig, RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.model.build import padded_vocab
from fp4pretrain.model.layout import Layout

_GIB = 2**30


@dataclass(frozen=True)
class StateBytes:
    """Bytes of each kind of state, on the rank that holds most."""

    weights: int
    gradients: int
    masters: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments

    def __str__(self) -> str:
        parts = ("weights", "gradients", "masters", "moments")
        each = ", ".join(f"{part} {getattr(self, part) / _GIB:.2f}" for part in parts)
        return f"{self.total / _GIB:.2f} GiB a rank before activations ({each})"


def state_bytes(config: RunConfig, layout: Layout) -> StateBytes:
    """Of a checked config on its ranks. Masters and moments are shared out over data parallelism where
    the optimizer is distributed; FP32 weights are their own masters."""
    count = max(parameters_of_stage(config, stage) for stage in (0, config.parallel.pipeline - 1))
    narrow = config.optim.params_dtype == "bf16"
    shares = layout.data if config.parallel.distributed_optimizer else 1
    return StateBytes(
        weights=count * (2 if narrow else 4),
        gradients=count * 4,
        masters=-(-count * 4 // shares) if narrow else 0,
        moments=-(-count * 8 // shares),
    )


def parameters_of_stage(config: RunConfig, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds."""
    m, p = config.model, config.parallel
    count = m.num_layers // p.pipeline * _block(m, p.tensor)
    matrix = padded_vocab(m.vocab_size, p.tensor) // p.tensor * m.hidden_size
    first, last = stage == 0, stage == p.pipeline - 1
    if first:
        count += matrix + (m.seq_length * m.hidden_size if m.position == "learned" else 0)
    if last:
        # a tied head on a stage of its own is a copy of the embedding
        count += _norm(m) * m.hidden_size
        count += 0 if m.tie_embeddings and first else matrix
    return count


def check_fits(state: StateBytes, device: torch.device) -> None:
    """Raises UserError where the state alone is more than a GPU has."""
    if device.type != "cuda":
        return
    there = torch.cuda.get_device_properties(device).total_memory
    if state.total > there:
        raise UserError(
            f"parallel.tensor: the run's state takes {state}, and this GPU has {there / _GIB:.0f} GiB; "
            "raise parallel.tensor or parallel.pipeline, start more ranks, or choose a smaller model"
        )


def _norm(m: ModelConfig) -> int:
    """Vectors of a norm: a weight, LayerNorm's bias."""
    return 2 if m.normalization == "layernorm" else 1


def _block(m: ModelConfig, tensor: int) -> int:
    heads, groups = m.num_attention_heads, m.num_query_groups or m.num_attention_heads
    size = m.kv_channels or m.hidden_size // heads
    up = m.ffn_hidden_size * (2 if m.activation == "swiglu" else 1)
    qkv, inner = (heads + 2 * groups) * size, heads * size
    sharded = m.hidden_size * (qkv + inner + up + m.ffn_hidden_size)
    whole = 2 * _norm(m) * m.hidden_size + (2 * _norm(m) * size if m.qk_norm else 0)
    if m.bias:  # of a row-parallel linear every rank has all
        sharded += qkv + up
        whole += 2 * m.hidden_size
    return sharded // tensor + whole
