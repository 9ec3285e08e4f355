"""Casting operands and multiplying them, one call each, on a backend.

backend             runs on                   operands
native              Blackwell, MI355X         packed FP4, multiplied as such
triton              NVIDIA, Ampere and later  exact BF16, or FP8; packed FP4 where saved
cpp                 CPUs, a C++ compiler      the reference's, cast by C++
reference           any device, plain torch   element x block scale, exact
"""

from fp4pretrain.ops.backend import Backend, cast_operands, multiply
from fp4pretrain.ops.casts import Cast, LinearCasts, Shard, lasting_casts, linear_casts
from fp4pretrain.ops.choice import choose
from fp4pretrain.ops.draws import Draws
from fp4pretrain.ops.keys import Moment, Site
from fp4pretrain.ops.operand import Operand
from fp4pretrain.ops.site_state import SiteState, sites_of

__all__ = [
    "Backend",
    "Cast",
    "Draws",
    "LinearCasts",
    "Moment",
    "Operand",
    "Shard",
    "Site",
    "SiteState",
    "cast_operands",
    "choose",
    "lasting_casts",
    "linear_casts",
    "multiply",
    "sites_of",
]
