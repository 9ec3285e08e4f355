"""A model in the words of megatron-core's own checkpoints: names of tensors, Megatron-LM's arguments.

Its local and its Transformer Engine layer spec store the same names: a norm belongs to the linear behind
it, which is one module with it in Transformer Engine. All blocks' tensors are one, with the block as first
axis (``decoder.layers.mlp.linear_fc2.weight`` [layers, hidden, ffn]); newer checkpoints may hold
``decoder.layers.N.…`` in place of that, and SwiGLU's gate and up projection as ``…weight_w`` and ``_v``.
Queries, keys and values lie as they do here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp4pretrain.config import ModelConfig
from fp4pretrain.errors import UserError
from fp4pretrain.precision.rules import LINEARS

LAYERS = "decoder.layers."
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_NORMALIZATION = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
_POSITION = {"rope": "rope", "learned": "learned_absolute"}
# Modules of a block that store an object beside their tensors: nothing, unless they train in FP8.
OBJECTS = (*LINEARS, "self_attention.core_attention")
# Arguments of models that are not trained here, with the values under which they are.
_ONLY: dict[str, tuple[Any, ...]] = {
    "num_experts": (None,),
    "multi_latent_attention": (False, None),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "add_qkv_bias": (False, None),
    "qk_l2_norm": (False, None),
    "attention_output_gate": (False, None),
    "window_size": (None,),
    "softmax_type": ("vanilla", None),
    "rotary_percent": (1, None),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False, None),
    "quick_geglu": (False, None),
    "fp16": (False, None),
}


def stored_name(ours: str) -> str:
    """Under what name megatron-core stores one of our parameters of a block (``input_layernorm.weight``)."""
    for norm, theirs in _NORMS.items():
        if ours.startswith(norm):
            return theirs + ours.removeprefix(norm)
    return ours


def stored_names(model: ModelConfig) -> set[str]:
    """Every tensor of a checkpoint of the model, a block's under ``decoder.layers.`` without a number."""
    ends = ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
    norms = ["input_layernorm", "pre_mlp_layernorm"]
    if model.qk_norm:
        norms += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    block = [f"{norm}.{end}" for norm in norms for end in ends]
    block += [f"{one}.{end}" for one in LINEARS for end in ("weight", *["bias"] * model.bias)]
    found = {LAYERS + stored_name(name) for name in block}
    found |= {"embedding.word_embeddings.weight"}
    found |= {f"decoder.final_layernorm.{end}" for end in ends}
    if model.position == "learned":
        found.add("embedding.position_embeddings.weight")
    if not model.tie_embeddings:
        found.add("output_layer.weight")
    return found


def arguments(model: ModelConfig, *, padded_vocab: int) -> dict[str, Any]:
    """Megatron-LM's arguments of the model, as its checkpoints hold them (``--use-checkpoint-args``).

    Raises UserError with the key that it has no word for.
    """
    if model.attention_softcap is not None:
        raise UserError(
            f"model.attention_softcap: megatron-core has no {model.attention_softcap} in its attention; a "
            "model with model.attention_softcap=null can be exported, so train such a one"
        )
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": model.kv_channels or model.hidden_size // heads,
        "seq_length": model.seq_length,
        "max_position_embeddings": model.seq_length,
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": 128,
        "swiglu": model.activation == "swiglu",
        "squared_relu": model.activation == "squared_relu",
        "bias_gelu_fusion": False,  # its fused GELU is the approximation by tanh
        "normalization": _NORMALIZATION[model.normalization],
        "norm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_norm,
        "position_embedding_type": _POSITION[model.position],
        "add_position_embedding": model.position == "learned",
        "use_rotary_position_embeddings": model.position == "rope",
        "rotary_base": model.rotary_base,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "add_bias_linear": model.bias,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "init_method_std": model.init_std,
    } | {name: values[0] for name, values in _ONLY.items()}


def section_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the model section, of as many as Megatron-LM's arguments tell.

    Raises UserError (``init: …``) for arguments of a model that is not trained here.
    """
    for name, values in _ONLY.items():
        if given.get(name, values[0]) not in values:
            raise UserError(
                f"init: the checkpoint's model was built with {name}={given[name]}, which is not trained "
                "here; give another model"
            )
    found: dict[str, Any] = {"attention_softcap": None}
    for name, key in (
        ("num_layers", "num_layers"),
        ("hidden_size", "hidden_size"),
        ("ffn_hidden_size", "ffn_hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("kv_channels", "kv_channels"),
        ("norm_epsilon", "norm_epsilon"),
        ("qk_layernorm", "qk_norm"),
        ("add_bias_linear", "bias"),
    ):
        if given.get(name) is not None:
            found[key] = given[name]
    if "swiglu" in given:
        relu = "squared_relu" if given.get("squared_relu") else "gelu"
        found["activation"] = "swiglu" if given["swiglu"] else relu
        if found["activation"] == "gelu" and found.get("bias") and given.get("bias_gelu_fusion"):
            raise UserError(
                "init: the checkpoint's model was built with bias_gelu_fusion=True, a GELU by tanh, which "
                "is not trained here; give another model"
            )
    if "normalization" in given:
        theirs = {name: ours for ours, name in _NORMALIZATION.items()}
        found["normalization"] = theirs.get(given["normalization"], given["normalization"])
    if "position_embedding_type" in given:
        kinds = {name: ours for ours, name in _POSITION.items()}
        kind = given["position_embedding_type"]
        found["position"] = kinds.get(kind, kind)
        if kind == "rope" and given.get("rotary_base") is not None:
            found["rotary_base"] = given["rotary_base"]
        if kind == "learned_absolute" and given.get("max_position_embeddings") is not None:
            found["seq_length"] = given["max_position_embeddings"]
    if "untie_embeddings_and_output_weights" in given:
        found["tie_embeddings"] = not given["untie_embeddings_and_output_weights"]
    if given.get("num_attention_heads") is not None:
        grouped = given.get("group_query_attention") and given.get("num_query_groups")
        found["num_query_groups"] = grouped or given["num_attention_heads"]
    return found
