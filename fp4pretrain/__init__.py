"""fp4pretrain: pretraining language models in 4-bit floating point on megatron-core."""

__version__ = "0.1.0"
