"""How large the inputs of a model's linears get over a text: one scale for all activations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from fp4pretrain.infer.model import Model
from fp4pretrain.infer.text import text_loss
from fp4pretrain.precision.rules import LINEARS


def largest_inputs(model: Model, documents: Iterable[str]) -> dict[tuple[int, str], float]:
    """(global layer, linear) -> the largest magnitude of its input, over all windows of the documents.

    Raises UserError (``--calibrate: ...``) where there is no token.
    """
    found: dict[tuple[int, str], torch.Tensor] = {}

    def see(place: tuple[int, str], _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        largest = inputs[0].detach().abs().amax().float()
        found[place] = torch.maximum(found[place], largest) if place in found else largest

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            partial(see, (layer.layer_number - 1, name))
        )
        for layer in model.gpt.decoder.layers
        for name in LINEARS
    ]
    try:
        text_loss(model, documents, key="--calibrate")
    finally:
        for handle in handles:
            handle.remove()
    return {place: float(largest) for place, largest in found.items()}
