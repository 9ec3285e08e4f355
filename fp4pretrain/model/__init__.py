"""From the run config to megatron-core's TransformerConfig, layer spec and GPT model."""

from fp4pretrain.model.build import build_model, model_config
from fp4pretrain.model.layout import check_layout

__all__ = ["build_model", "check_layout", "model_config"]
