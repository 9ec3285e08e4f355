"""megatron-core's own model, none of our modules: what its checkpoints are held to."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch.nn.functional as F
from fp4pretrain.parallel.groups import join
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

import torch
from fp4pretrain.config import compose


def plain(a: Namespace, *, tensor: int = 1, pipeline: int = 1) -> GPTModel:
    """This rank's part of the model of a checkpoint's arguments, by the local layer spec."""
    activation = F.silu if a.swiglu else (lambda x: F.relu(x).square()) if a.squared_relu else F.gelu
    config = TransformerConfig(
        num_layers=a.num_layers, hidden_size=a.hidden_size, ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads, num_query_groups=a.num_query_groups,
        kv_channels=a.kv_channels, normalization=a.normalization, layernorm_epsilon=a.norm_epsilon,
        qk_layernorm=a.qk_layernorm, gated_linear_unit=a.swiglu, activation_func=activation,
        add_bias_linear=a.add_bias_linear, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(qk_layernorm=a.qk_layernorm, normalization=a.normalization)
    return GPTModel(
        config, spec, a.padded_vocab_size, a.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=a.position_embedding_type, rotary_base=a.rotary_base,
        share_embeddings_and_output_weights=not a.untie_embeddings_and_output_weights,
    ).eval()  # fmt: skip


def load_plain(folder: str, **layout: int) -> tuple[GPTModel, Namespace]:
    """The model in a checkpoint, which has to hold what it asks for and nothing else."""
    a = dist_checkpointing.load_common_state_dict(folder)["args"]
    model = plain(a, **layout)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    found = dist_checkpointing.load(state, folder, strict="assume_ok_unexpected")
    model.load_state_dict(found["model"], strict=True)
    return model, a


def load_and_save(overrides: list[str], out: str, *, steps: int, device: str) -> dict[str, Any]:
    """A job of a rank: load what ``init`` names on the layout of the overrides, and save it from there."""
    config = compose(overrides)
    layout = {"tensor": config.parallel.tensor, "pipeline": config.parallel.pipeline}
    join(device=torch.device(device), seed=1, **layout)
    model, a = load_plain(f"{config.init}/release", **layout)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    state = {"model": model.sharded_state_dict(metadata=metadata), "args": a}
    dist_checkpointing.save(state, out)
    return {"folder": out}
