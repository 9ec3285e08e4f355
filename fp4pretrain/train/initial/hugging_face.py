"""A Hugging Face model as the start of a run.

Only config.json and safetensors are read: no pickle, and no code that a folder may bring.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from fp4pretrain.config import ModelConfig
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.model.families import Family, Linear, family_of
from fp4pretrain.train.initial.refusals import another_model, damaged

# Their key -> our key of the model section, and what a config.json that leaves it out means.
_KEYS: dict[str, tuple[str, Any]] = {
    "num_hidden_layers": ("num_layers", None),
    "n_layer": ("num_layers", 12),
    "hidden_size": ("hidden_size", None),
    "n_embd": ("hidden_size", 768),
    "intermediate_size": ("ffn_hidden_size", None),
    "n_inner": ("ffn_hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "n_head": ("num_attention_heads", 12),
    "num_key_value_heads": ("num_query_groups", None),
    "head_dim": ("kv_channels", None),
    "vocab_size": ("vocab_size", None),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "rope_theta": ("rotary_base", 10000.0),
    "attention_bias": ("bias", False),
    "mlp_bias": ("bias", False),
    "hidden_act": ("activation", None),
    "activation_function": ("activation", "gelu_new"),
    "n_positions": ("seq_length", 1024),
    "tie_word_embeddings": ("tie_embeddings", None),
}
_ACTIVATIONS = {"silu": "swiglu", "gelu": "gelu", "relu2": "squared_relu"}


class HuggingFaceSource:
    """The tensors of a folder under our names."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._folder = folder
        self._family = family_of(model)
        _compare(folder, self._family)
        self._files = _places(folder)
        self._linears = {linear.ours: linear for linear in self._family.linears}

    def part(self, leaf: ShardedTensor) -> torch.Tensor:
        """This rank's part of one of the model's tensors, of the leaf's shape and dtype."""
        ahead = leaf.prepend_axis_num
        name = leaf.key
        if ahead:
            name = name.removeprefix("decoder.layers.")
            whole = self._of_layer(name, layer=leaf.global_offset[0])
        else:
            ours, _, end = name.rpartition(".")
            whole = self._tensor(f"{self._family.outside[ours]}.{end}")
        out = torch.zeros(leaf.local_shape, dtype=leaf.dtype)
        shape, offset = leaf.global_shape[ahead:], leaf.global_offset[ahead:]
        padded = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        if tuple(whole.shape) != tuple(shape) and not (padded and whole.shape[1] == shape[1]):
            raise damaged(self._folder, f"{leaf.key} is {list(whole.shape)} and not {list(shape)}")
        # rows that pad the vocabulary stay zero
        begin = tuple(slice(o, o + n) for o, n in zip(offset, leaf.local_shape, strict=True))
        found = whole[begin]
        out[tuple(slice(0, n) for n in found.shape)] = found.to(leaf.dtype)
        return out

    def _of_layer(self, name: str, *, layer: int) -> torch.Tensor:
        ours, _, end = name.rpartition(".")
        prefix = self._family.layer.format(layer)
        linear = self._linears.get(ours)
        if linear is None:
            return self._tensor(f"{prefix}{self._family.norms[ours]}.{end}")
        parts = [self._tensor(f"{prefix}{theirs}.{end}") for theirs in linear.theirs]
        if end == "weight" and self._family.transposed:
            parts = [part.t() for part in parts]
        return _joined(linear, parts)

    def _tensor(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        for known in (
            name,
            name.removeprefix("transformer."),
        ):  # GPT-2's first files have no prefix
            if known in self._files:
                try:
                    with safe_open(self._folder / self._files[known], "pt") as file:
                        return file.get_tensor(known)
                except (SafetensorError, OSError) as error:
                    raise damaged(self._folder, first_line(error)) from None
        raise damaged(self._folder, f"{name} is not in it")


def _joined(linear: Linear, parts: list[torch.Tensor]) -> torch.Tensor:
    rows = sum(part.shape[0] for part in parts)
    whole = parts[0].new_empty((rows, *parts[0].shape[1:]))
    for place, part in zip(linear.rows, parts, strict=True):
        if place is None:
            whole.copy_(part)
        else:
            whole[place] = part
    return whole


def _places(folder: Path) -> dict[str, str]:
    """Tensor -> the safetensors file that holds it."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file.name)
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise damaged(file, reason) from None
    if not found:
        raise UserError(
            f"init: {folder} has no safetensors, and nothing else is read (a pickle is a program); save "
            "the model with safe_serialization=True"
        )
    return found


def _compare(folder: Path, family: Family) -> None:
    """Raises UserError with every key of the model section that would have to be another."""
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = theirs["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"init: {folder} has no config.json of a model; give a Hugging Face model's local folder"
        ) from None
    ours = family.config
    if kind != ours["model_type"]:
        raise UserError(
            f"init: {folder} is a {kind} and this model section describes a {ours['model_type']}; change "
            "model.activation, normalization, position or qk_norm, or give another folder"
        )
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" or theirs.get("quantization_config"):
        what = "quantized" if theirs.get("quantization_config") else f"of rope_type {scaling}"
        raise UserError(f"init: {folder} is {what}, which is not trained here; give another model")
    theirs = {"rope_theta": rope.get("rope_theta"), **_known(theirs)}
    wanted = {}
    for key, expected in ours.items():
        if key in _KEYS:
            name, default = _KEYS[key]
            found = theirs.get(key)
            found = _missing(key, theirs, default) if found is None else found
            if found != expected:
                wanted[name] = _ACTIVATIONS.get(found, found) if name == "activation" else found
    if wanted:
        raise another_model(folder, wanted)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _missing(key: str, theirs: dict[str, Any], default: Any) -> Any:
    """What a config.json without ``key`` says of it."""
    if key == "num_key_value_heads":
        return theirs.get("num_attention_heads")
    if key == "head_dim":
        return theirs.get("hidden_size", 0) // max(1, theirs.get("num_attention_heads", 1))
    if key == "n_inner":
        return 4 * theirs.get("n_embd", 768)
    if key == "hidden_act":
        return "relu2" if theirs["model_type"] == "arcee" else "silu"
    if key == "tie_word_embeddings":
        return theirs["model_type"] == "gpt2"
    return default
