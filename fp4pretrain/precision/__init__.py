"""What a GEMM computes (Recipe) and which linear computes it when (Plan): no tensors here."""

from fp4pretrain.precision.plan import Keep, Plan, Tail
from fp4pretrain.precision.recipe import (
    BF16,
    GEMMS,
    OPERANDS,
    Dgrad,
    Fprop,
    Gemm,
    Recipe,
    Rotation,
    Wgrad,
)

__all__ = [
    "BF16",
    "GEMMS",
    "OPERANDS",
    "Dgrad",
    "Fprop",
    "Gemm",
    "Keep",
    "Plan",
    "Recipe",
    "Rotation",
    "Tail",
    "Wgrad",
]
