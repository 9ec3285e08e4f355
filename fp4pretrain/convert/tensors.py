"""A model's tensors under an architecture's names, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fp4pretrain.config import ModelConfig
from fp4pretrain.convert.weights import CheckpointWeights
from fp4pretrain.model.families import Family, Linear

# (layer, our linear's name, its weight [n, k], rows of each of theirs) -> name's end -> tensor
Pack = Callable[[int, Linear, torch.Tensor], list[dict[str, torch.Tensor]] | None]


def tensors_of(
    family: Family, model: ModelConfig, weights: CheckpointWeights, pack: Pack | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything the architecture stores, in the type that ``weights`` reads.

    ``pack``: makes what is stored of a linear's weight; where it gives None that is the weight.
    """
    for ours, theirs in family.outside.items():
        yield from _outside(ours, theirs, model, weights)
    for layer in range(model.num_layers):
        prefix = family.layer.format(layer)
        for ours, theirs in family.norms.items():
            for end in ("weight", "bias"):
                if weights.has(f"decoder.layers.{ours}.{end}"):
                    yield f"{prefix}{theirs}.{end}", weights.of_layer(f"{ours}.{end}", layer)
        for linear in family.linears:
            yield from _linear(family, linear, layer, weights, pack)


def _outside(
    ours: str, theirs: str, model: ModelConfig, weights: CheckpointWeights
) -> Iterator[tuple[str, torch.Tensor]]:
    if ours == "output_layer" and model.tie_embeddings:
        return
    for end in ("weight", "bias"):
        if weights.has(f"{ours}.{end}"):
            found = weights.whole(f"{ours}.{end}")
            if ours in ("embedding.word_embeddings", "output_layer"):
                found = found[: model.vocab_size].clone()  # less the rows that pad it
            yield f"{theirs}.{end}", found


def _linear(
    family: Family, linear: Linear, layer: int, weights: CheckpointWeights, pack: Pack | None
) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = family.layer.format(layer)
    weight = weights.of_layer(f"{linear.ours}.weight", layer)
    packed = pack(layer, linear, weight) if pack is not None else None
    bias = None
    if weights.has(f"decoder.layers.{linear.ours}.bias"):
        bias = weights.of_layer(f"{linear.ours}.bias", layer)
    elif family.zero_biases:
        bias = weight.new_zeros(weight.shape[0])
    for place, (theirs, rows) in enumerate(zip(linear.theirs, linear.rows, strict=True)):
        if packed is not None:
            yield from ((f"{prefix}{theirs}.{end}", t) for end, t in packed[place].items())
        else:
            part = weight if rows is None else weight[rows]
            yield f"{prefix}{theirs}.weight", (part.t() if family.transposed else part).contiguous()
        if bias is not None:
            yield f"{prefix}{theirs}.bias", (bias if rows is None else bias[rows]).contiguous()
