"""Linears' weights in FP4 as two layouts store them: compressed-tensors' and that of NVIDIA's ModelOpt.

A weight is cast as its recipe's forward pass casts it, so the stored matrix is the trained one, value
by value. Parts of one matrix of ours (queries, keys, values) share its scale. Of a linear [n, k] in
NVFP4 there are, in compressed-tensors (format ``nvfp4-pack-quantized``, which vLLM and transformers read):

    weight_packed        uint8 [n, k / 2], two E2M1 codes a byte, the even column in the low nibble
    weight_scale         float8_e4m3fn [n, k / 16]; tiles of 16 x 16 repeat theirs in 16 rows
    weight_global_scale  fp32 [1]; a value is code * weight_scale / weight_global_scale

and in MXFP4 (``mxfp4-pack-quantized``) weight_packed and weight_scale, uint8 [n, k / 32], the exponent
plus 127. Activations are left in BF16: a recipe scales them by each batch, and the layout has one scale
for all batches. ModelOpt's (hf_quant_config.json, which vLLM and TensorRT-LLM read) has, of NVFP4 alone:

    weight               uint8 [n, k / 2] as weight_packed
    weight_scale         float8_e4m3fn [n, k / 16]
    weight_scale_2       fp32 []: a value is code * weight_scale * weight_scale_2
    input_scale          fp32 []: largest input / 2688, of a text that was run through the model; without
                         such a text there is none, and the algorithm is W4A16_NVFP4, activations in BF16
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fp4pretrain import __version__
from fp4pretrain.errors import UserError
from fp4pretrain.model.families import Family, Linear
from fp4pretrain.numerics import QuantizedTensor, QuantSpec, quantize
from fp4pretrain.numerics.scaling import mx_stretch
from fp4pretrain.precision import Plan, Progress
from fp4pretrain.precision.rules import QKV_PARTS

LAYOUTS = ("compressed-tensors", "modelopt")
# (global layer, our linear's name) -> the largest magnitude of its input over a text
Inputs = Mapping[tuple[int, str], float]

_NVFP4_LARGEST = 6.0 * 448.0
_FORMATS = {"nvfp4": ("nvfp4-pack-quantized", 16), "mxfp4": ("mxfp4-pack-quantized", 32)}


class Packer:
    """Casts the linears that the plan has in FP4 at ``progress``; a ``Pack`` for ``tensors_of``.

    ``inputs``: of ModelOpt's layout, what the scales of activations come from.
    Raises UserError where it has none, or what the layout cannot say: two formats, a rotated forward
    pass, a factor on the product, a second term, an amax of earlier steps.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        family: Family,
        *,
        layout: str = LAYOUTS[0],
        inputs: Inputs | None = None,
    ) -> None:
        if family.transposed:
            raise UserError(
                f"--quantize: {family.architecture} stores no linears that the FP4 layout knows; "
                "export without --quantize"
            )
        self._specs: dict[tuple[int, str], QuantSpec] = {}
        for layer, name in plan.linears():
            fprop = plan.at(layer, name, progress).fprop
            if layer is None or fprop.w.format not in _FORMATS:
                continue
            if name in QKV_PARTS:
                raise UserError(
                    f"--quantize: rules give q, k and v of block {layer} different recipes, and their "
                    "weights are packed as one matrix; export without --quantize"
                )
            if fprop.rotation.active:
                raise UserError(
                    f"--quantize: precision.fprop.rotation: {name} of block {layer} multiplies rotated "
                    "weights by rotated activations, which no reader of this layout does; export "
                    "without --quantize"
                )
            if inputs is not None and fprop.x.format != "nvfp4":
                raise UserError(
                    f"--calibrate: the recipe has activations in {fprop.x.format} and not in nvfp4, which "
                    "is what the layout has scales for; export without --calibrate"
                )
            self._specs[layer, name] = fprop.w
        formats = {spec.format for spec in self._specs.values()}
        if not formats:
            raise UserError(
                "--quantize: the recipe's forward pass has no linear's weight in nvfp4 or mxfp4 at the "
                "end of this checkpoint; export without --quantize"
            )
        if len(formats) > 1:
            raise UserError(
                "--quantize: the forward pass mixes nvfp4 and mxfp4, and one folder holds one of them; "
                "export without --quantize"
            )
        for spec in self._specs.values():
            what = _beyond(spec)
            if what is not None:
                raise UserError(
                    f"--quantize: precision.fprop.w.{what} that the layout has no place for; export "
                    "without --quantize"
                )
        format_ = formats.pop()
        self.layout, self.group = _FORMATS[format_]
        self._modelopt, self._inputs = layout == "modelopt", inputs
        if self._modelopt:
            if format_ != "nvfp4":
                raise UserError(
                    f"--layout: modelopt has no place for {format_}; use --layout compressed-tensors"
                )
            self.layout = "W4A16_NVFP4" if inputs is None else "NVFP4"
        self._family, self._layers = family, plan.num_layers

    def __call__(
        self, layer: int, linear: Linear, weight: torch.Tensor
    ) -> list[dict[str, torch.Tensor]] | None:
        spec = self._specs.get((layer, linear.ours))
        if spec is None:
            return None
        if weight.shape[1] % self.group:
            raise UserError(
                f"--quantize: {linear.ours} has {weight.shape[1]} input features, no multiple of the "
                f"layout's {self.group}; export without --quantize"
            )
        # what the GEMM of the run cast: weights as they are stored for it
        cast = quantize(weight, spec)
        parts = []
        scales = _row_scales(cast)
        for rows in linear.rows:
            codes, scale = (t if rows is None else t[rows] for t in (cast.codes, scales))
            part = {"weight_packed": codes.contiguous(), "weight_scale": scale.contiguous()}
            if self._modelopt:
                part["weight"] = part.pop("weight_packed")
                part["weight_scale_2"] = cast.alpha().reshape(()).float()
                if self._inputs is not None:
                    largest = torch.tensor(self._inputs[layer, linear.ours])
                    part["input_scale"] = largest.clamp(min=1e-12) / _NVFP4_LARGEST
            elif spec.format == "nvfp4":
                part["weight_global_scale"] = (1.0 / cast.alpha()).reshape(1).float()
            parts.append(part)
        return parts

    def files(self) -> dict[str, dict[str, Any]]:
        """JSON files beside config.json."""
        if not self._modelopt:
            return {}
        quantization = {
            "quant_algo": self.layout,
            "kv_cache_quant_algo": None,
            "group_size": self.group,
            "exclude_modules": self._ignored(),
        }
        producer = {"name": "fp4pretrain", "version": __version__}
        return {"hf_quant_config.json": {"producer": producer, "quantization": quantization}}

    def _ignored(self) -> list[str]:
        """Linears that are not in FP4."""
        ignored = ["lm_head"]
        for layer in range(self._layers):
            for linear in self._family.linears:
                if (layer, linear.ours) not in self._specs:
                    prefix = self._family.layer.format(layer)
                    ignored += [prefix + name for name in linear.theirs]
        return ignored

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        if self._modelopt:
            return {
                "quant_method": "modelopt",
                "quant_algo": self.layout,
                "group_size": self.group,
                "ignore": self._ignored(),
            }
        nvfp4 = self.group == 16
        weights = {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group" if nvfp4 else "group",
            "group_size": self.group,
            "symmetric": True,
            "dynamic": False,
        }
        if not nvfp4:
            weights |= {"scale_dtype": "torch.uint8"}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.layout,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                    "format": self.layout,
                }
            },
            "ignore": self._ignored(),
        }


def _beyond(spec: QuantSpec) -> str | None:
    """What a cast is made of beside codes and scales of the tensor itself, as a clause with its key."""
    if spec.format == "mxfp4" and mx_stretch(spec)[1] != 1:
        return f"scale: {spec.scale} has a factor on the product"
    if spec.split != "none":
        return f"split: {spec.split} is a second term"
    if spec.amax != "current":
        return f"amax: {spec.amax} is a number of the run"
    return None


def _row_scales(cast: QuantizedTensor) -> torch.Tensor:
    """One scale a row and block of columns, as bytes of the layout's type."""
    assert cast.scales is not None
    scales = cast.scales
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    rows = cast.shape[0]
    times = cast.spec.block_shape(cast.shape)[0]
    raw = scales.view(torch.uint8).repeat_interleave(times, dim=0)[:rows]
    return raw.view(scales.dtype)
