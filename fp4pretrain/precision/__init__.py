"""What a GEMM computes (Recipe) and which linear computes it when (Plan): no tensors here."""

from fp4pretrain.precision.deoscillation import Deoscillation
from fp4pretrain.precision.plan import Plan
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
from fp4pretrain.precision.rules import Keep, Rule, Tail
from fp4pretrain.precision.when import Point, Progress, Trigger, parse_point, parse_trigger

__all__ = [
    "BF16",
    "GEMMS",
    "OPERANDS",
    "Deoscillation",
    "Dgrad",
    "Fprop",
    "Gemm",
    "Keep",
    "Plan",
    "Point",
    "Progress",
    "Recipe",
    "Rotation",
    "Rule",
    "Tail",
    "Trigger",
    "Wgrad",
    "parse_point",
    "parse_trigger",
]
