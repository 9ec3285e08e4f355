"""``model.implementation=transformer_engine``: blocks of Transformer Engine's modules, by megatron-core's own
layer spec. The peer that our linears, norms and attention are timed against, in BF16 and in the recipes
that Transformer Engine has.

Its modules cast, multiply and normalize by themselves, in one recipe for the whole run with whole blocks in
BF16 at the ends; the plan's words are turned into its own where it computes the same, and refused where
not. The head is ours. Its noise comes from a generator and not from keys, so a run with stochastic rounding
is not resumed bit for bit, nor equal on another layout. Checkpoints have our names, so ``generate``, ``eval``
and ``export`` read its runs by our modules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.nvidia import why_no_engine
from fp4pretrain.precision import BF16, Plan, Recipe
from fp4pretrain.precision.recipe import Rotation

ENGINE = "transformer_engine"
_KEY = "model.implementation"
# A norm is part of the linear behind it there; in checkpoints it has our name.
_OUR_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_E4M3, _E5M2 = (QuantSpec(name, block="tensor") for name in ("fp8_e4m3", "fp8_e5m2"))
_MXFP8 = QuantSpec("mxfp8", block="1d", scale="rceil")
_NVFP4 = QuantSpec("nvfp4", block="1d")
_WGRAD_H16 = Rotation("random_hadamard", 16, "never", "te")


def check_engine(config: RunConfig, plan: Plan, device: torch.device) -> None:
    """Raises UserError where the run asks for Transformer Engine's modules and they are not here, cannot
    run on the device, or compute something else than the run's config says."""
    if config.model.implementation != ENGINE:
        return
    cure = f"use {_KEY}=fp4pretrain"
    missing = why_no_engine()
    if missing is not None:
        raise UserError(f"{_KEY}: no {missing}; or {cure}")
    if device.type != "cuda":
        raise UserError(f"{_KEY}: {ENGINE} runs on CUDA and not on {device.type}; {cure}")
    fields = engine_fields(plan)
    for there, what in (
        (
            config.model.attention_softcap is not None,
            "model.attention_softcap: its attention has none",
        ),
        (config.data.document_mask, "data.document_mask: its attention is causal alone"),
        (config.observe.interval > 0, "observe.interval: it shows no casts"),
        (bool(plan.deoscillation), "precision.deoscillation: it shows no casts of weights"),
        (
            bool(fields) and config.train.eval_bf16,
            "train.eval_bf16: its linears cannot be put into BF16 for an evaluation; set it to false",
        ),
    ):
        if there:
            raise UserError(f"{_KEY}: {ENGINE} has no place for {what}, or {cure}")


def engine_fields(plan: Plan) -> dict[str, Any]:
    """The fields of megatron-core's TransformerConfig that make Transformer Engine follow a plan.

    None in BF16. Raises UserError for a plan that it cannot follow.
    """
    blocks = []
    for layer in range(plan.num_layers):
        names = [name for at, name in plan.linears() if at == layer]
        found = {recipe for name in names for recipe in plan.recipes_of(layer, name)}
        if len(found) > 1:
            raise _refused(f"block {layer} has linears or moments of different recipes")
        blocks.append(_fields(found.pop()))
    quantized = [fields for fields in blocks if fields]
    if not quantized:
        return {}
    if any(fields != quantized[0] for fields in quantized):
        raise _refused("blocks have different quantized recipes")
    first = next(i for i, fields in enumerate(blocks) if fields)
    last = next(i for i, fields in enumerate(reversed(blocks)) if fields)
    if len(quantized) != len(blocks) - first - last:
        raise _refused("blocks in the middle are in BF16")
    if not first and not last:
        return quantized[0]
    if quantized[0].get("fp8_recipe") == "delayed":
        raise _refused("blocks are in BF16 beside delayed scaling")
    return quantized[0] | {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def engine_spec(transformer: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or virtual stage) and the final norm, all Transformer Engine's."""
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=transformer.qk_layernorm
    )
    spec.submodules = replace(spec.submodules, sharded_state_dict_keys_map=_OUR_NAMES)
    layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * layers, layer_norm=gpt_layer_specs.TENorm
    )


def engine_words(plan: Plan) -> str:
    """Transformer Engine's recipe, for people: ``fp8=hybrid, fp8_recipe=tensorwise``."""
    return ", ".join(f"{key}={value}" for key, value in engine_fields(plan).items()) or "bf16"


def _refused(why: str) -> UserError:
    return UserError(
        f"{_KEY}: {ENGINE} has one recipe for a whole run, and {why}; use a recipe such as fp8 without "
        f"rules, or {_KEY}=fp4pretrain"
    )


def _fields(recipe: Recipe) -> dict[str, Any]:
    """The fields for one recipe, none for BF16. Raises UserError for a recipe that Transformer Engine does
    not have."""
    if recipe == BF16:
        return {}
    if _is(recipe, x=_E4M3, w=_E4M3, dy=_E5M2):
        return {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    steps = recipe.fprop.x.amax_steps
    e4m3, e5m2 = (replace(one, amax="delayed", amax_steps=steps) for one in (_E4M3, _E5M2))
    if _is(recipe, x=e4m3, w=e4m3, dy=e5m2):
        return {
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            "fp8_amax_history_len": steps,
            "fp8_amax_compute_algo": "max",
        }
    if _is(recipe, x=_MXFP8, w=_MXFP8, dy=_MXFP8):
        return {"fp8": "e4m3", "fp8_recipe": "mxfp8"}
    stochastic = replace(_NVFP4, rounding="stochastic")
    if _is(recipe, x=_NVFP4, w=replace(_NVFP4, block="2d"), dy=stochastic, wgrad=_WGRAD_H16):
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    raise UserError(
        f"{_KEY}: {ENGINE} has no such recipe (it has bf16, fp8, fp8_delayed, mxfp8 and nvfp4 as they "
        f"ship, but for rules); use one of them, or {_KEY}=fp4pretrain"
    )


def _is(
    recipe: Recipe, *, x: QuantSpec, w: QuantSpec, dy: QuantSpec, wgrad: Rotation | None = None
) -> bool:
    wanted = {"x": x, "w": w, "dy": dy}
    specs = all(spec == wanted[operand] for _, operand, spec in recipe.operands())
    plain = not (recipe.fprop.rotation.active or recipe.dgrad.rotation.active)
    return specs and plain and recipe.wgrad.rotation == (wgrad or Rotation())
