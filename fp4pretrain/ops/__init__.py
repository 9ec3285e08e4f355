"""Casting operands and multiplying them, one call each, on a backend.

backend             runs on                   operands
native              Blackwell, MI355X         packed FP4, multiplied as such
triton              NVIDIA, Ampere and later  exact BF16, or FP8; packed FP4 where kept
reference           any device, plain torch   element x block scale, exact
"""

from fp4pretrain.ops.backend import Backend, Cast, cast_operands, choose
from fp4pretrain.ops.keys import NoiseKeys

__all__ = ["Backend", "Cast", "NoiseKeys", "cast_operands", "choose"]
