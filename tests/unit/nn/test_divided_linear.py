"""A linear whose rows follow different recipes: each part is its recipe's, and dx is the parts' sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_lab import B, K, N, S, T, build, draw, products, recipe_of, run

from fp4pretrain.precision import BF16, Recipe

# Two groups of 64, 32 and 32 rows, as attention lays out queries, keys and values; 256 in all.
_LETTERS = ("q" * 64 + "k" * 32 + "v" * 32) * 2


def rows_of(letters: str) -> torch.Tensor:
    found = [row for row, letter in enumerate(_LETTERS) if letter in letters]
    return torch.tensor(found, device=torch.cuda.current_device())


def divided(parts: dict[str, Recipe], *, bias: bool = False):
    """A linear [N, K], one ``recipe`` for each group of letters."""
    linear = build("column", BF16, bias=bias)
    linear.divide(
        [(rows_of(letters), replace(linear.bound, recipe=one)) for letters, one in parts.items()]
    )
    return linear


PLANS = {
    "Q and K in MXFP8": {"qk": "mxfp8", "v": "nvfp4"},
    "rows that are not neighbours, fresh rotations": {"qv": "mxfp4_rht_sr", "k": "bf16"},
    "three recipes": {"q": "fp8_block", "k": "quartet2", "v": "averis"},
}


@pytest.mark.parametrize("name", PLANS)
def test_every_part_is_the_product_of_its_own_operands(name: str) -> None:
    """Bounds: BF16's rounding of a result (2^-8), and 2^-24 of each product of a sum in FP32."""
    parts = {letters: recipe_of(recipe) for letters, recipe in PLANS[name].items()}
    linear = divided(parts)
    x, dy = draw()
    found = run(linear, x, dy)
    dx, of_dx = torch.zeros(T, K, dtype=torch.float64), torch.zeros(T, K, dtype=torch.float64)
    for letters, recipe in parts.items():
        rows = rows_of(letters)
        truth = products(recipe, x, linear.weight[rows], dy[..., rows])
        _near(found["y"][:, rows], *truth["y"], length=K)
        _near(found["dw"][rows], *truth["dw"], length=T)
        dx, of_dx = dx + truth["dx"][0][:, :K], of_dx + truth["dx"][1][:, :K]
    _near(found["dx"], dx, of_dx, length=N)


def _near(
    found: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, *, length: int
) -> None:
    exact, magnitude = (t[:, : found.shape[1]] for t in (exact, magnitude))
    limit = 2.0**-7 * exact.abs() + (length + 8) * 2.0**-24 * magnitude
    assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("name", ["bf16", "mxfp8", "mxfp4_h16"])
def test_parts_of_one_recipe_are_the_undivided_linear(name: str) -> None:
    """Bit for bit in y and dw, where no scale spans rows (BF16, MX): a row's codes are its own. dx sums over
    rows, which the parts sum apart, so its sums are taken in another order; a part's blocks along the rows
    are the whole's, since parts lie in runs of 32. A format with a scale for the whole tensor (NVFP4) would
    have one for each part, which is another number."""
    recipe = recipe_of(name)
    whole = build("column", recipe, bias=True)
    parts = divided(dict.fromkeys("qkv", recipe), bias=True)
    parts.load_state_dict(whole.state_dict())
    x, dy = draw()
    one, other = run(whole, x, dy), run(parts, x, dy)
    assert torch.equal(one["y"], other["y"])
    assert torch.equal(one["dw"], other["dw"])
    assert torch.equal(one["db"], other["db"])
    torch.testing.assert_close(one["dx"].float(), other["dx"].float(), rtol=2.0**-7, atol=1e-6)


def test_gradients_are_added_to_the_main_gradient() -> None:
    """As megatron-core's DDP keeps it, in FP32, over two microbatches and all parts."""
    parts = {"qk": recipe_of("mxfp8"), "v": recipe_of("mxfp4_h16")}
    linear = divided(parts)
    x, dy = draw()
    alone = run(linear, x, dy)["dw"].float()
    linear.weight.main_grad = torch.zeros(N, K, device=x.device)
    for _ in range(2):
        run(linear, x, dy)
    assert linear.weight.grad_added_to_main_grad
    torch.testing.assert_close(linear.weight.main_grad, 2 * alone, rtol=2.0**-7, atol=1e-7)


def test_a_changed_weight_is_cast_anew() -> None:
    linear = divided({"qk": recipe_of("mxfp8"), "v": recipe_of("nvfp4")})
    x = torch.randn(S, B, K, device=torch.cuda.current_device(), dtype=torch.bfloat16)
    before = linear(x)[0]
    with torch.no_grad():
        linear.weight.neg_()
    assert torch.equal(linear(x)[0], -before)
