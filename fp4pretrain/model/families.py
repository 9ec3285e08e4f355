"""Which Hugging Face architecture computes what a model section describes, and under which names.

One table serves both directions: ``family_of`` gives the names of every tensor of ours in the
architecture, and which rows of ours each of theirs is.

    rmsnorm, rope, swiglu                    LlamaForCausalLM
    rmsnorm, rope, swiglu, qk_norm           Qwen3ForCausalLM
    rmsnorm, rope, squared_relu or gelu      ArceeForCausalLM (an MLP without a gate)
    layernorm, learned positions, no gate    GPT2LMHeadModel

megatron-core keeps the queries of a group beside its key and its value, one group after the other;
Hugging Face keeps all queries, all keys, all values. GPT-2's matrices are transposed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fp4pretrain.config import ModelConfig
from fp4pretrain.errors import UserError
from fp4pretrain.precision.rules import LINEARS

_QKV, _PROJ, _FC1, _FC2 = LINEARS
_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "squared_relu": "relu2"}


@dataclass(frozen=True)
class Linear:
    """A linear of a block: ``theirs[i]`` has the rows ``rows[i]`` of ours (None: all of them)."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Family:
    """An architecture with the names of its tensors. Block names lack ``layer.format(number)``.

    ``norms``, ``outside``: our name -> theirs, of a block's norms (also of queries and keys) and of
    what is outside the blocks, without ``.weight``. ``transposed``: linears are stored [in, out].
    ``zero_biases``: it has biases where the model has none.
    """

    architecture: str
    config: dict[str, Any]
    layer: str
    linears: tuple[Linear, ...]
    norms: dict[str, str]
    outside: dict[str, str]
    transposed: bool = False
    zero_biases: bool = False


def family_of(model: ModelConfig) -> Family:
    """The architecture that computes the same function. Raises UserError with the key that none has."""
    if model.attention_softcap is not None:
        raise _none("attention_softcap", model.attention_softcap, "null")
    if model.position == "rope":
        return _llama_like(model)
    return _gpt2(model)


def _none(key: str, value: object, cure: str) -> UserError:
    return UserError(
        f"model.{key}: no Hugging Face architecture has {value} beside the rest of this model; it can "
        f"be exported with model.{key}={cure} alone, so train such a model to export it"
    )


def _head_size(model: ModelConfig) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def _qkv_rows(model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of linear_qkv that are queries, keys and values, in the order of the heads."""
    heads, size = model.num_attention_heads, _head_size(model)
    groups = model.num_query_groups or heads
    each = heads // groups
    rows = torch.arange((heads + 2 * groups) * size).view(groups, each + 2, size)
    return rows[:, :each].reshape(-1), rows[:, each].reshape(-1), rows[:, each + 1].reshape(-1)


def _common(model: ModelConfig, architecture: str, kind: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
    }


def _llama_like(model: ModelConfig) -> Family:
    if model.normalization != "rmsnorm":
        raise _none("normalization", model.normalization, "rmsnorm")
    gated = model.activation == "swiglu"
    if model.qk_norm and not gated:
        raise _none("qk_norm", True, "false")
    if model.qk_norm and model.bias:
        raise _none("bias", True, "false")
    architecture, kind = "LlamaForCausalLM", "llama"
    if model.qk_norm:
        architecture, kind = "Qwen3ForCausalLM", "qwen3"
    elif not gated:
        architecture, kind = "ArceeForCausalLM", "arcee"
    base = float(model.rotary_base)
    config = _common(model, architecture, kind) | {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": _head_size(model),
        "hidden_act": _ACTIVATIONS[model.activation],
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": base,  # of transformers before 5; rope_parameters from 5 on
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.attention_dropout,
    }
    if kind == "qwen3":
        del config["mlp_bias"]
    half = torch.arange(model.ffn_hidden_size)
    up: tuple[torch.Tensor | None, ...] = (half, half + model.ffn_hidden_size) if gated else (None,)
    names = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",)
    norms = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    if model.qk_norm:
        norms["self_attention.q_layernorm"] = "self_attn.q_norm"
        norms["self_attention.k_layernorm"] = "self_attn.k_norm"
    return Family(
        architecture,
        config,
        layer="model.layers.{}.",
        linears=(
            Linear(_QKV, tuple(f"self_attn.{x}_proj" for x in "qkv"), _qkv_rows(model)),
            Linear(_PROJ, ("self_attn.o_proj",), (None,)),
            Linear(_FC1, names, up),
            Linear(_FC2, ("mlp.down_proj",), (None,)),
        ),
        norms=norms,
        outside={
            "embedding.word_embeddings": "model.embed_tokens",
            "decoder.final_layernorm": "model.norm",
            "output_layer": "lm_head",
        },
    )


def _gpt2(model: ModelConfig) -> Family:
    heads = model.num_attention_heads
    if model.normalization != "layernorm":
        raise _none("normalization", model.normalization, "layernorm")
    if model.activation == "swiglu":
        raise _none("activation", model.activation, "gelu")
    if model.qk_norm:
        raise _none("qk_norm", True, "false")
    if (model.num_query_groups or heads) != heads:
        raise _none("num_query_groups", model.num_query_groups, str(heads))
    if _head_size(model) * heads != model.hidden_size:
        raise _none("kv_channels", model.kv_channels, "null")
    config = _common(model, "GPT2LMHeadModel", "gpt2") | {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": heads,
        "n_positions": model.seq_length,
        "activation_function": _ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
    }
    return Family(
        "GPT2LMHeadModel",
        config,
        layer="transformer.h.{}.",
        linears=(
            Linear(_QKV, ("attn.c_attn",), (torch.cat(_qkv_rows(model)),)),
            Linear(_PROJ, ("attn.c_proj",), (None,)),
            Linear(_FC1, ("mlp.c_fc",), (None,)),
            Linear(_FC2, ("mlp.c_proj",), (None,)),
        ),
        norms={"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"},
        outside={
            "embedding.word_embeddings": "transformer.wte",
            "embedding.position_embeddings": "transformer.wpe",
            "decoder.final_layernorm": "transformer.ln_f",
            "output_layer": "lm_head",
        },
        transposed=True,
        zero_biases=not model.bias,
    )
