"""What the tests of linears share: building one, drawing its tensors, and the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from fp4pretrain.config import compose, plan_of
from fp4pretrain.nn.clock import Clock
from fp4pretrain.nn.linear import Binding, ColumnParallelQuantLinear, RowParallelQuantLinear
from fp4pretrain.numerics import Noise, derive_key, quantize, rotate
from fp4pretrain.ops import Cast, Moment, Site, SiteState, sites_of
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import Recipe

# Three different sizes, so that a wrong orientation cannot fit; multiples of the largest block.
S, B, N, K = 64, 2, 256, 384
T = S * B
SEED, LAYER, LINEAR = 77, 3, 2


@cache
def recipe_of(name: str) -> Recipe:
    return plan_of(compose([f"precision={name}"])).recipe


@dataclass
class SpyBackend(ReferenceBackend):
    """The reference backend, noting what it was asked to cast, and which sums might be fast."""

    casts: list[tuple[int, Cast]] = field(default_factory=list)
    fast: list[bool] = field(default_factory=list)

    def quantize(self, x: torch.Tensor, casts: Sequence[Cast], *how: Any, **named: Any) -> list:
        self.casts += [(x.data_ptr(), cast) for cast in casts]
        return super().quantize(x, casts, *how, **named)

    def gemm(self, a: Any, b: Any, *, fast_accum: bool, **how: Any) -> torch.Tensor:
        self.fast.append(fast_accum)
        return super().gemm(a, b, fast_accum=fast_accum, **how)

    def casts_of(self, x: torch.Tensor) -> list[Cast]:
        return [cast for pointer, cast in self.casts if pointer == x.data_ptr()]


def build(
    kind: str,
    recipe: Recipe,
    *,
    bias: bool = False,
    backend: Any = None,
    clock: Clock | None = None,
    n: int = N,
    k: int = K,
    packed_weights: bool = False,
) -> Any:
    """A bound linear [n, k] with random BF16 weights, ``kind`` column or row."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=k,
        num_attention_heads=1,
        params_dtype=torch.bfloat16,
        bf16=True,
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = dict(
        config=config, init_method=config.init_method, bias=bias, skip_bias_add=False
    )
    linear: Any
    if kind == "column":
        linear = ColumnParallelQuantLinear(k, n, gather_output=False, **common)
    else:
        linear = RowParallelQuantLinear(k, n, input_is_parallel=True, is_expert=False, **common)
    with torch.no_grad():
        linear.weight.copy_(with_outliers(n, k, scale=0.05))
        if bias:
            linear.bias.copy_(torch.randn(n))
    linear.bind(
        Binding(
            backend or ReferenceBackend(),
            clock or Clock(SEED),
            layer=LAYER,
            linear=LINEAR,
            recipe=recipe,
            sites=SiteState(sites_of({(LAYER, LINEAR): [recipe]}), linear.weight.device),
            packed_weights=packed_weights,
        )
    )
    return linear


def with_outliers(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """BF16 N(0, scale) where one element in 2048 is 30 times as large. Never ones."""
    x = torch.randn(shape) * scale
    outliers = torch.rand(shape) < 1 / 2048
    device = torch.cuda.current_device()
    return torch.where(outliers, x * 30, x).bfloat16().to(device)


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    """x [S, B, K] and a gradient dy [S, B, N] of the size that gradients have."""
    return with_outliers(S, B, K).requires_grad_(), with_outliers(S, B, N, scale=1e-3)


def at(step: int = 0, microbatch: int = 0) -> Moment:
    return Moment(SEED, step, microbatch)


# How each operand lies, its contraction axis last.
ORIENTED = {
    ("fprop", "x"): lambda x: x,
    ("fprop", "w"): lambda w: w,
    ("dgrad", "dy"): lambda dy: dy,
    ("dgrad", "w"): lambda w: w.t(),
    ("wgrad", "dy"): lambda dy: dy.t(),
    ("wgrad", "x"): lambda x: x.t(),
}


def operand(
    recipe: Recipe, gemm: str, name: str, tensor: torch.Tensor, moment: Moment, *, cast: bool
) -> torch.Tensor:
    """One operand in float64, contraction axis last: the very operand, or (``cast`` false) exact.

    Made by ``quantize(...).dequantize()`` of the stored codes, not by the backend's short cut.
    """
    matrix = tensor.detach().reshape(-1, tensor.shape[-1])
    if not cast:
        return ORIENTED[gemm, name](matrix).double()
    spec = recipe.operand(gemm, name)
    site = Site(LAYER, LINEAR, gemm, name)
    noise = moment.noise(site) if spec.stochastic else None
    if spec.source == "forward":
        copied = operand(recipe, "fprop", name, tensor, moment, cast=True)
        matrix = copied[:, : matrix.shape[1]].float()
    if spec.split == "mean":
        mean = matrix.float().mean(dim=0).to(matrix.dtype)
        terms = [matrix - mean, mean.expand_as(matrix)]
    else:
        terms = [matrix]
    total = torch.zeros(())
    for number, term in enumerate(terms):
        if number and noise is not None:
            noise = replace(noise, key=derive_key(noise.key, 0x7E, number))
        total = total + _cast(recipe, site, ORIENTED[gemm, name](term), moment, noise)
    if spec.split == "channels":
        exact = ORIENTED[gemm, name](matrix).float()
        lost = F.pad(exact, (0, total.shape[1] - exact.shape[1])).double() - total
        share = -int(-spec.channels * lost.shape[1] // 1)
        cold = lost.abs().sum(dim=0).argsort(descending=True)[share:]
        lost[:, cold] = 0.0
        if noise is not None:
            noise = replace(noise, key=derive_key(noise.key, 0x7E, 1))
        total = total + _cast(recipe, site, lost.float(), moment, noise)
    return total


def _cast(
    recipe: Recipe, site: Site, oriented: torch.Tensor, moment: Moment, noise: Noise | None
) -> torch.Tensor:
    spec, rotation = recipe.operand(site.gemm, site.operand), recipe.gemm(site.gemm).rotation
    multiple = recipe.gemm(site.gemm).contraction_multiple
    oriented = F.pad(oriented, (0, -oriented.shape[1] % multiple))
    if rotation.active:
        oriented = rotate(
            oriented.contiguous(),
            size=rotation.size,
            signs=moment.signs(site, rotation),
            round_bf16=rotation.dtype == "bf16",
        )
    amax = torch.tensor(spec.amax_value) if spec.amax == "fixed" else None
    q = quantize(oriented.contiguous(), spec, noise=noise, amax=amax, group=rotation.size)
    return q.dequantize(torch.float64)


def products(
    recipe: Recipe,
    x: torch.Tensor,
    w: torch.Tensor,
    dy: torch.Tensor,
    *,
    moment: Moment | None = None,
    cast: bool = True,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Float64 y [T, N], dx [T, K], dw [N, K], each with its sum of |a| |b| (for error bounds)."""
    moment = moment or at()
    out = {}
    for result, gemm, (a, a_name), (b, b_name) in (
        ("y", "fprop", (x, "x"), (w, "w")),
        ("dx", "dgrad", (dy, "dy"), (w, "w")),
        ("dw", "wgrad", (dy, "dy"), (x, "x")),
    ):
        a64 = operand(recipe, gemm, a_name, a, moment, cast=cast)
        b64 = operand(recipe, gemm, b_name, b, moment, cast=cast)
        out[result] = a64 @ b64.t(), a64.abs() @ b64.abs().t()
    return out


def run(linear: Any, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx, dw (and db) of one forward and backward, as matrices."""
    x.grad = linear.weight.grad = None
    y, _ = linear(x)
    y.backward(dy)
    found = {"y": y.detach().flatten(0, -2), "dx": x.grad.flatten(0, -2)}
    found["dw"] = linear.weight.grad
    if linear.bias is not None:
        found["db"], linear.bias.grad = linear.bias.grad, None
    return found
