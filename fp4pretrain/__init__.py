"""fp4pretrain: pretraining language models in 4-bit floating point on megatron-core."""

from fp4pretrain.megatron_core import import_lean

__version__ = "0.1.0"
import_lean()
