"""The three GEMMs of a linear, for every shipped recipe, against float64: y, dx, dw and db.

x, w and dy are random with outliers, never ones: a gradient of ones hides a wrong cast of dy.
"""

from __future__ import annotations

import pytest
import torch
from covering import COVERING
from linear_lab import (
    LAYER,
    LINEAR,
    B,
    K,
    N,
    S,
    T,
    at,
    build,
    draw,
    operand,
    products,
    recipe_of,
    run,
    with_outliers,
)

from fp4pretrain.nn.clock import Clock
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import Site
from fp4pretrain.precision import Dgrad, Fprop, Recipe, Rotation, Wgrad

SHIPPED = COVERING
# What a researcher may write and no shipped recipe uses: every scale rule family, every kind of
# signs, full-precision noise, stochastic x and w, quantized operands beside BF16 ones.
_NV = QuantSpec("nvfp4", rounding="stochastic_full", scale="unbiased")
_MX2D = QuantSpec("mxfp4", block="2d", rounding="stochastic", ties="away", scale="rceil")
WRITTEN = {
    "nvfp4_unbiased_everywhere": Recipe(
        Fprop(_NV, _NV, Rotation("random_hadamard", 16, "layer")),
        Dgrad(_NV, _NV, Rotation("random_hadamard", 32, "step")),
        Wgrad(_NV, _NV, Rotation("random_hadamard", 128, "gemm")),
    ),
    "mixed": Recipe(
        Fprop(QuantSpec("nvfp4", scale="four_over_six"), QuantSpec()),
        Dgrad(QuantSpec("mxfp8_e5m2"), _MX2D),
        Wgrad(QuantSpec("fp8_e5m2", block="row"), QuantSpec(), Rotation("hadamard", 64)),
    ),
}
_EDEN = QuantSpec("nvfp4", rounding="eden")
_COPY = QuantSpec("nvfp4", rounding="eden", source="forward")
_MEAN = QuantSpec("nvfp4", rounding="stochastic", split="mean")
_HOT = QuantSpec("nvfp4", split="channels")
WRITTEN |= {
    "copies": Recipe(
        Fprop(QuantSpec("nvfp4", scale="four_over_six"), QuantSpec("nvfp4")),
        Dgrad(_EDEN, _COPY, Rotation("random_hadamard", 128, "gemm")),
        Wgrad(_EDEN, _COPY, Rotation("random_hadamard", 32, "gemm")),
    ),
    "means": Recipe(
        Fprop(QuantSpec("nvfp4", split="mean"), QuantSpec("nvfp4", block="2d")),
        Dgrad(_MEAN, QuantSpec("nvfp4", block="2d")),
        Wgrad(_MEAN, QuantSpec("nvfp4", split="mean"), Rotation("random_hadamard", 16)),
    ),
    "hot channels": Recipe(
        Fprop(_HOT, _HOT), Dgrad(QuantSpec("nvfp4"), _HOT), Wgrad(_HOT, QuantSpec("nvfp4"))
    ),
    "levels": Recipe(
        Fprop(QuantSpec("ue5m3", amax="held"), QuantSpec("ue5m3", block="2d32")),
        Dgrad(QuantSpec("nvfp4_local"), QuantSpec("nvfp4_local", block="2d")),
        Wgrad(QuantSpec("nvfp4_double", rounding="stochastic"), QuantSpec("nvfp4_double")),
    ),
    "full grid, six bits, fixed": Recipe(
        Fprop(
            QuantSpec("mxfp4", scale="full_grid"),
            QuantSpec("mxfp4", "2d", scale="full_grid_adaptive"),
        ),
        Dgrad(QuantSpec("mxfp6_e3m2"), QuantSpec("mxfp6_e2m3")),
        Wgrad(QuantSpec("nvfp4", amax="fixed", amax_value=8.0), QuantSpec("nvfp4", amax="delayed")),
    ),
}
# Half the distance of BF16's 8 significant bits, at the power of two below a number.
BF16_ROUNDING = 2.0**-8


def fp32_sum(k: int) -> float:
    """Bound on |fp32(sum of k products) - sum| over the sum of magnitudes, in any order.

    One rounding a product, k - 1 in the sum, one for each tensor scale here and in the oracle's
    dequantized operands, of 2^-24 each.
    """
    return (k + 6) * 2.0**-24


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("name", [*SHIPPED, *WRITTEN])
def test_y_dx_dw_are_the_products_of_the_very_operands(name: str, kind: str, bias: bool) -> None:
    recipe = WRITTEN.get(name) or recipe_of(name)
    linear = build(kind, recipe, bias=bias)
    x, dy = draw()
    found = run(linear, x, dy)
    truth = products(recipe, x, linear.weight, dy)
    for result, k in (("y", x.shape[-1]), ("dx", N), ("dw", T)):
        exact, magnitude = truth[result]
        limit = BF16_ROUNDING * exact.abs() + fp32_sum(k) * magnitude
        if result == "y" and bias:
            exact = exact + linear.bias.detach().double()
            limit = limit + BF16_ROUNDING * (exact.abs() + limit)
        limit = limit * (1 + BF16_ROUNDING)  # what is rounded carries the sum's error already
        error = (found[result].double() - exact).abs()
        assert found[result].dtype == torch.bfloat16
        assert (error <= limit).all(), f"{result}: {(error / limit).max():.2f} of the bound"
    if bias:
        exact, magnitude = (f(dy.reshape(T, N).double()).sum(0) for f in (lambda t: t, torch.abs))
        limit = BF16_ROUNDING * exact.abs() + fp32_sum(T) * magnitude
        assert ((found["db"].double() - exact).abs() <= limit * (1 + BF16_ROUNDING)).all()


# Relative error (root mean square) that rounding leaves on one operand. Uniform error of a step:
# step / sqrt(12), where steps are 2^-mantissa_bits of a power of two, so for a value spread evenly
# in the logarithm 2^-m * sqrt(mean(2^-2f)) / sqrt(12) = 0.21 * 2^-m: E4M3 .026, E5M2 .053. FP4, by
# numerics.md's mean squared errors on N(0, 1): nearest 1x16 .0090 -> .095, 16x16 .0124 -> .111,
# SR .0235 -> .153. MXFP4's power-of-two scales cost a tenth more.
OPERAND_ERROR = {
    ("bf16", "nearest"): 0.0,
    ("fp8_e4m3", "nearest"): 0.026,
    ("fp8_e5m2", "nearest"): 0.053,
    ("mxfp8", "nearest"): 0.026,
    ("nvfp4", "nearest"): 0.105,
    ("nvfp4", "stochastic"): 0.153,
    # equal steps: amax / 7 / sqrt(12) with an amax of 1.8 of 16 and 3.0 of 256 Gaussians is .074 and
    # .124; stochastic rounding has twice the variance, and an outlier takes its whole block along
    ("int4", "nearest"): 0.105,
    ("int4", "stochastic"): 0.140,
    ("mxfp4", "nearest"): 0.115,
    ("mxfp4", "stochastic"): 0.168,
}


@pytest.mark.parametrize(
    "name", ["bf16", "fp8", "fp8_block", "mxfp8", "nvfp4", "int4", "mxfp4_rht_sr", "mxfp4_h16"]
)
def test_the_error_is_the_quantization_noise_that_the_recipe_is_known_for(name: str) -> None:
    """Independent errors of both operands add in squares; BF16's output rounding is .0017."""
    recipe = recipe_of(name)
    linear = build("column", recipe)
    with torch.no_grad():  # the published errors are of Gaussian weights
        linear.weight.normal_(0, 0.05)
    x, dy = draw()
    found = run(linear, x, dy)
    truth = products(recipe, x, linear.weight, dy, cast=False)
    for result, gemm in (("y", "fprop"), ("dx", "dgrad"), ("dw", "wgrad")):
        errors = [OPERAND_ERROR[s.format, s.rounding] for g, _, s in recipe.operands() if g == gemm]
        expected = (sum(e * e for e in errors) + 0.0017**2) ** 0.5
        exact = truth[result][0]
        error = float((found[result].double() - exact).norm() / exact.norm())
        assert expected / 1.4 < error < expected * 1.4, (result, error, expected)


def _mean_errors(recipe: Recipe, draws: int, *, fair: Recipe) -> dict[int, dict[str, float]]:
    """Relative error of the mean of dx and dw over the first 1, 2, 4, ... ``draws`` steps.

    The truth keeps the operands that ``fair`` rounds to nearest as they are cast: stochastic
    rounding owes nothing for them.
    """
    clock = Clock(5)
    linear = build("row", recipe, clock=clock)
    x, dy = draw()
    tensors = {"x": x, "w": linear.weight, "dy": dy}
    truth, total = {}, {}
    for result, gemm in (("dx", "dgrad"), ("dw", "wgrad")):
        names = ("dy", "w") if gemm == "dgrad" else ("dy", "x")
        exact = [_expected_operand(fair, gemm, name, tensors[name]) for name in names]
        truth[result] = exact[0] @ exact[1].t()
        total[result] = torch.zeros_like(truth[result])
    errors: dict[int, dict[str, float]] = {}
    for step in range(draws):
        clock.step = step
        clock.weights_changed()
        found = run(linear, x, dy)
        for result, sum_ in total.items():
            sum_ += found[result].double()
        n = step + 1
        if n & (n - 1) == 0:
            errors[n] = {
                r: float((total[r] / n - truth[r]).norm() / truth[r].norm()) for r in truth
            }
    return errors


def _expected_operand(recipe: Recipe, gemm: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    spec, rotation = recipe.operand(gemm, name), recipe.gemm(gemm).rotation
    if spec.source == "forward":
        copied = operand(recipe, "fprop", name, tensor, at(), cast=True)
        tensor = copied[:, : tensor.shape[-1]]
    if not spec.stochastic:
        exact = operand(recipe, gemm, name, tensor, at(), cast=True)
    else:
        exact = operand(recipe, gemm, name, tensor, at(), cast=False)
        if rotation.active and rotation.resample == "never":  # to meet a nearest, rotated partner
            exact = _rotated(
                exact, at().signs(Site(LAYER, LINEAR, gemm, name), rotation), rotation.size
            )
    return exact


def _rotated(x: torch.Tensor, signs: tuple[int, ...] | None, size: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    d = torch.diag(torch.tensor(signs or (1,) * size, dtype=torch.float64, device=x.device))
    return (x.reshape(-1, size) @ d @ h / size**0.5).view(x.shape)


# Draws that stochastic rounding makes fair, and what a scale rule adds: nvfp4's default may round a
# block's scale down by up to 1/17 and then clips its largest element (numerics.md), a few percent of
# one element in 16; Quartet II's scale cannot clip.
_NVFP4 = recipe_of("nvfp4")
_UNBIASED = QuantSpec("nvfp4", rounding="stochastic", scale="unbiased")
_FULL = QuantSpec("nvfp4", rounding="stochastic_full", scale="unbiased")
STOCHASTIC = {
    "nvfp4": (_NVFP4, 0.014),
    "mxfp4_rht_sr": (recipe_of("mxfp4_rht_sr"), 0.0),
    "int4": (recipe_of("int4"), 0.014),
    "averis": (recipe_of("averis"), 0.014),
    "ue5m3": (recipe_of("ue5m3"), 0.014),
    "ue5m3_b32": (recipe_of("ue5m3_b32"), 0.014),
    "nvfp4_local_h16": (recipe_of("nvfp4_local_h16"), 0.014),
    "hot_channels": (recipe_of("hot_channels"), 0.014),
    "nvfp4_fixed": (recipe_of("nvfp4_fixed"), 0.014),
    "tetrajet2": (recipe_of("tetrajet2"), 0.0),
    "quartet2": (recipe_of("quartet2"), 0.0),
    "mxfp4_h32_full_grid": (recipe_of("mxfp4_h32_full_grid"), 0.0),
    "nvfp4, unbiased scale": (
        Recipe(
            _NVFP4.fprop,
            Dgrad(_UNBIASED, _NVFP4.dgrad.w),
            Wgrad(_FULL, _NVFP4.wgrad.x, _NVFP4.wgrad.rotation),
        ),
        0.0,
    ),
}


def test_every_shipped_stochastic_recipe_is_tested_for_bias() -> None:
    found = {n for n in SHIPPED if any(s.stochastic for *_, s in recipe_of(n).operands())}
    assert found and found <= set(STOCHASTIC)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_gradients_are_unbiased(name: str) -> None:
    """Averaging n steps' draws shrinks the error as 1/sqrt(n): 16 times the draws, a quarter."""
    recipe, bias = STOCHASTIC[name]
    errors = _mean_errors(recipe, 32, fair=recipe)
    drawn = {g for g, _, spec in recipe.operands() if spec.stochastic}
    for result, gemm in (("dx", "dgrad"), ("dw", "wgrad")):
        if gemm not in drawn:
            continue
        assert errors[1][result] > 0.08
        for few, many in ((1, 16), (2, 32)):
            quarter = errors[few][result] / 4
            assert 0.85 * quarter < errors[many][result]
            assert errors[many][result] < ((1.15 * quarter) ** 2 + bias**2) ** 0.5


def test_rounding_to_nearest_does_not_average_out() -> None:
    """So the law above can fail: the mean of nearest draws stays where the first one is."""
    recipe, _ = STOCHASTIC["nvfp4, unbiased scale"]
    nearest = Recipe(recipe.fprop, Dgrad(QuantSpec("nvfp4"), recipe.dgrad.w), recipe.wgrad)
    sr_error, nearest_error = (
        _mean_errors(r, 16, fair=recipe)[16]["dx"] for r in (recipe, nearest)
    )
    assert sr_error < 0.05 < 0.08 < nearest_error


@pytest.mark.parametrize("kind", ["column", "row"])
def test_evaluation_computes_what_training_computes_and_keeps_nothing(kind: str) -> None:
    linear = build(kind, recipe_of("nvfp4"))
    x = with_outliers(S, B, K)
    y, _ = linear(x)
    with torch.no_grad():
        z, _ = linear(x)
    assert y.requires_grad and not z.requires_grad
    assert torch.equal(y, z)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("kind", ["column", "row"])
def test_sizes_that_blocks_and_rotations_do_not_divide_are_padded_exactly(
    name: str, kind: str
) -> None:
    """30 tokens, 40 output features, 72 input features: products of the padded operands, cut."""
    recipe = recipe_of(name)
    linear = build(kind, recipe, n=40, k=72)
    x, dy = with_outliers(15, 2, 72).requires_grad_(), with_outliers(15, 2, 40, scale=1e-3)
    found = run(linear, x, dy)
    truth = products(recipe, x, linear.weight, dy)
    for result, shape, k in (("y", (30, 40), 72), ("dx", (30, 72), 40), ("dw", (40, 72), 30)):
        exact, magnitude = truth[result]
        limit = (BF16_ROUNDING * exact.abs() + fp32_sum(k) * magnitude) * (1 + BF16_ROUNDING)
        assert found[result].shape == exact.shape == shape
        assert ((found[result].double() - exact).abs() <= limit).all(), result


@pytest.mark.parametrize("name", SHIPPED)
def test_a_microbatch_without_tokens_leaves_gradients_of_zeros(name: str) -> None:
    """What an expert that no token chose will send."""
    linear = build("column", recipe_of(name))
    x = torch.empty(0, 2, K, dtype=torch.bfloat16, requires_grad=True)
    y, _ = linear(x)
    assert y.shape == (0, 2, N)
    y.backward(torch.empty(0, 2, N, dtype=torch.bfloat16))
    assert x.grad is not None and x.grad.shape == x.shape
    assert linear.weight.grad.shape == (N, K) and not linear.weight.grad.any()
