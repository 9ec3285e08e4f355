"""The layer spec: megatron-core's transformer layer built from our linears, norm and attention.

``get_gpt_layer_local_spec`` hard-codes its own modules, so the spec is written out here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from fp4pretrain.nn.attention import CoreAttention
from fp4pretrain.nn.fused import FusedLayer, FusedNorm, FusedSelfAttention
from fp4pretrain.nn.linear import ColumnParallelQuantLinear, RowParallelQuantLinear
from fp4pretrain.nn.norm import Norm


def _mlp() -> Any:
    submodules = MLPSubmodules(
        linear_fc1=ColumnParallelQuantLinear, linear_fc2=RowParallelQuantLinear
    )
    if hasattr(MLP, "as_mlp_submodule"):  # megatron-core 0.19 builds the MLP by a call
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def layer_spec(*, qk_norm: bool, softcap: float | None, fused: bool) -> ModuleSpec:
    """One decoder layer: norm, attention, norm, MLP.

    ``qk_norm``: queries and keys are normalized over a head's channels. ``softcap``: of attention
    scores, None for none. ``fused``: by the layer, norms and attention of `fused`.
    """
    block_norm = FusedNorm if fused else Norm
    norm = block_norm if qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelQuantLinear,
        core_attention=ModuleSpec(module=CoreAttention, params={"softcap": softcap}),
        linear_proj=RowParallelQuantLinear,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(
        module=FusedLayer if fused else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=block_norm,
            self_attention=ModuleSpec(
                module=FusedSelfAttention if fused else SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=block_norm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TransformerConfig,
    vp_stage: int | None,
    *,
    softcap: float | None = None,
    fused: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or virtual stage) and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    spec = layer_spec(qk_norm=config.qk_layernorm, softcap=softcap, fused=fused)
    norm = FusedNorm if fused else Norm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)
