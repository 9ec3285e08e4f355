"""Shipped recipes that between them use every word of every shipped recipe.

Laws that hold for each cast alone are tried on these; a recipe that only combines their words anew (an
ablation, another size) is composed and held to its paper, not trained on every layout.
"""

from __future__ import annotations

from dataclasses import asdict

from fp4pretrain.precision import GEMMS, Recipe

COVERING = (
    "bf16",
    "fp8",
    "fp8_block",
    "fp8_delayed",
    "mxfp8",
    "mxfp6",
    "nvfp4",
    "int4",
    "mxfp4_rht_sr",
    "mxfp4_bwd",
    "mxfp4_h16",
    "mxfp4_random_h16",
    "mxfp4_h32_full_grid",
    "quartet2",
    "tetrajet2",
    "averis",
    "hot_channels",
    "ue5m3",
    "ue5m3_b32",
    "nvfp4_local_h16",
    "nvfp4_fixed",
)


def words(recipe: Recipe) -> set[tuple]:
    """(format, knob, value) of every cast and (knob, value) of every rotation."""
    found: set[tuple] = set()
    for _, _, spec in recipe.operands():
        fields = {k: v for k, v in asdict(spec).items() if isinstance(v, str)}
        found |= {(spec.format, *item) for item in fields.items()}
    for gemm in GEMMS:
        rotation = asdict(recipe.gemm(gemm).rotation)
        found |= {(key, rotation[key]) for key in ("kind", "resample", "signs", "dtype")}
    return found
