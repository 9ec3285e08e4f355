"""Initial weights that do not depend on the layout.

megatron-core seeds each tensor-parallel rank and pipeline stage differently, so another layout is
another model. Here every parameter is drawn whole from a generator seeded by (seed, global name) and
each rank keeps its part: one process and a thousand start from the same weights, bit for bit, on the
same kind of device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from fp4pretrain.numerics import derive_key

_INIT = 3
# Residual branches end in these: their std shrinks with depth (GPT-2; megatron-core's default).
_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def initialize(model: GPTModel, *, seed: int, std: float, num_layers: int) -> None:
    """Fill the matrices of one model chunk: N(0, std), std / sqrt(2 layers) for residual outputs.

    Norm weights and biases keep their ones and zeros. A head tied to the embedding on another
    pipeline stage is drawn as that embedding.
    """
    group = model.pg_collection.tp
    tied = model.share_embeddings_and_output_weights
    first = _first_layer(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = std / math.sqrt(2 * num_layers) if name.endswith(_OUTPUTS) else std
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        _fill(parameter, _global_name(name, first), scale, seed, group)


def _first_layer(model: GPTModel) -> int:
    layers = model.decoder.layers
    return layers[0].layer_number - 1 if len(layers) else 0


def _global_name(name: str, first_layer: int) -> str:
    parts = name.split(".")
    if "layers" in parts:
        index = parts.index("layers") + 1
        parts[index] = str(int(parts[index]) + first_layer)
    return ".".join(parts)


def _fill(
    parameter: Any,  # a Parameter with megatron-core's tensor-parallel attributes
    name: str,
    std: float,
    seed: int,
    group: torch.distributed.ProcessGroup,
) -> None:
    key = derive_key(seed, _INIT, *name.encode())
    generator = torch.Generator(device=parameter.device).manual_seed(key >> 1)
    sharded = getattr(parameter, "tensor_model_parallel", False)
    dim = parameter.partition_dim if sharded else 0
    stride = parameter.partition_stride if sharded else 1
    ranks = group.size() if sharded else 1
    shape = list(parameter.shape)
    shape[dim] *= ranks
    whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
    whole.normal_(0.0, std, generator=generator)
    if ranks > 1:
        # stride parts (SwiGLU: gate and up), each split over the ranks
        pieces = whole.chunk(ranks * stride, dim=dim)
        whole = torch.cat(pieces[group.rank() :: ranks], dim=dim)
    with torch.no_grad():
        parameter.copy_(whole)
