"""What a linear keeps and when it draws anew: main gradients, frozen weights, caches, recompute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import COVERING
from linear_lab import (
    SEED,
    K,
    N,
    SpyBackend,
    T,
    at,
    build,
    draw,
    products,
    recipe_of,
    run,
)
from megatron.core import tensor_parallel

from fp4pretrain.nn.clock import Clock
from fp4pretrain.nn.linear import QuantLinear
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import Cast
from fp4pretrain.precision import BF16, Dgrad, Fprop, Recipe, Wgrad

RECIPES = COVERING
STOCHASTIC = ["nvfp4", "mxfp4_rht_sr"]
# Nothing of fprop is cast; drawn anew each microbatch; cast in terms; scales that no transpose can share.
NOT_ONCE = (
    *("bf16", "mxfp4_bwd", "mxfp4_rht_sr", "quartet2"),
    *("tetrajet2", "hot_channels", "nvfp4_local_h16"),
)
KINDS = pytest.mark.parametrize("kind", ["column", "row"])


def with_main_grad(linear: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What megatron-core's DDP attaches; it holds something already."""
    linear.weight.main_grad = torch.full_like(linear.weight, 0.5, dtype=dtype)
    linear.weight.grad_added_to_main_grad = False
    return linear.weight.main_grad


@KINDS
@pytest.mark.parametrize("name", RECIPES)
def test_main_gradients_add_up_in_fp32_over_microbatches(name: str, kind: str) -> None:
    """No BF16 in between: the error is that of FP32 sums of T products, plus two additions."""
    recipe, clock = recipe_of(name), Clock(SEED)
    linear = build(kind, recipe, clock=clock)
    main_grad = with_main_grad(linear)
    exact = torch.full((N, K), 0.5, dtype=torch.float64, device=main_grad.device)
    magnitude = exact.clone()
    for microbatch in range(2):
        clock.microbatch = microbatch
        x, dy = draw()
        found = run(linear, x, dy)
        dw, sizes = products(recipe, x, linear.weight, dy, moment=at(0, microbatch))["dw"]
        exact += dw
        magnitude += sizes
        assert linear.weight.grad_added_to_main_grad
        # the dummy that autograd needs to fire DDP's hooks
        assert found["dw"].shape == linear.weight.shape
        assert found["dw"].dtype == linear.weight.dtype
    assert linear.weight.main_grad is main_grad
    assert ((main_grad.double() - exact).abs() <= (T + 8) * 2.0**-24 * magnitude).all()


def test_a_shared_weight_gets_a_dummy_of_zeros() -> None:
    """A tied embedding's own gradient is added to the dummy, so megatron-core asks for zeros."""
    linear = build("column", BF16)
    with_main_grad(linear)
    linear.weight.zero_out_wgrad = True
    x, dy = draw()
    assert not run(linear, x, dy)["dw"].any()
    assert (linear.weight.main_grad != 0.5).any()


@pytest.mark.parametrize("main", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_only_the_gemm_that_may_sum_fast_is_told_so(gemm: str, main: torch.dtype | None) -> None:
    """Whatever becomes of dw: a recipe's sums do not depend on there being a main gradient."""
    gemms = ("fprop", "dgrad", "wgrad")
    changes = {g: replace(BF16.gemm(g), fast_accum=g == gemm) for g in gemms}
    backend = SpyBackend()
    linear = build("column", replace(BF16, **changes), backend=backend)
    if main is not None:
        with_main_grad(linear, main)
    run(linear, *draw())
    assert backend.fast == [g == gemm for g in gemms]


def test_a_bf16_main_gradient_is_added_to_in_bf16() -> None:
    linear = build("column", recipe_of("nvfp4"))
    x, dy = draw()
    dw = run(linear, x, dy)["dw"]
    main_grad = with_main_grad(linear, torch.bfloat16)
    run(linear, x, dy)
    assert torch.equal(main_grad, 0.5 + dw)


@KINDS
@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("averis", "hot_channels")])
def test_a_frozen_weight_gets_no_gradient_and_keeps_no_operand_for_one(
    name: str, kind: str
) -> None:
    recipe, spy = recipe_of(name), SpyBackend()
    linear = build(kind, recipe, backend=spy)
    x, dy = draw()
    trained = run(linear, x, dy)
    spy.casts.clear()
    linear.weight.requires_grad_(False)
    frozen = run(linear, x, dy)
    assert frozen["dw"] is None
    assert torch.equal(frozen["y"], trained["y"]) and torch.equal(frozen["dx"], trained["dx"])
    assert [c.spec for c in spy.casts_of(x)] == [recipe.fprop.x]
    assert [c.spec for c in spy.casts_of(dy)] == [recipe.dgrad.dy]


def test_an_input_that_needs_no_gradient_gets_none_and_dy_is_cast_for_wgrad_alone() -> None:
    recipe, spy = recipe_of("nvfp4"), SpyBackend()
    linear = build("column", recipe, backend=spy)
    x, dy = draw()
    expected = run(linear, x, dy)["dw"]
    spy.casts.clear()
    linear.weight.grad = None
    linear(x.detach())[0].backward(dy)
    assert torch.equal(linear.weight.grad, expected)
    assert [(c.transpose, c.rotation_size) for c in spy.casts_of(dy)] == [(True, 16)]


def weight_casts(linear: Any, spy: SpyBackend, *, grad: bool = True) -> int:
    """How many casts of the weight one call makes."""
    spy.casts.clear()
    x, dy = draw()
    if grad:
        run(linear, x, dy)
    else:
        with torch.no_grad():
            linear(x)
    return len(spy.casts_of(linear.weight))


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in NOT_ONCE])
def test_a_weight_is_cast_once_a_step(name: str) -> None:
    spy, clock = SpyBackend(), Clock(SEED)
    linear = build("column", recipe_of(name), backend=spy, clock=clock)
    for step in range(2):
        clock.step = step
        for microbatch in range(3):
            clock.microbatch = microbatch
            # 2d tiles: dgrad's operand is fprop's transposed
            once = 1 if recipe_of(name).fprop.w.tiled else 2
            assert weight_casts(linear, spy) == (once if microbatch == 0 else 0)
        clock.weights_changed()


def test_calls_without_gradients_share_the_casts() -> None:
    """Activation recompute alternates the two kinds of call for each microbatch."""
    spy = SpyBackend()
    linear = build("column", recipe_of("mxfp8"), backend=spy)
    counts = [weight_casts(linear, spy, grad=grad) for grad in (False, True, False, True, False)]
    assert counts == [1, 1, 0, 0, 0]


def test_one_operand_of_2d_tiles_serves_both_passes() -> None:
    spy = SpyBackend()
    linear = build("column", recipe_of("nvfp4"), backend=spy)
    counts = [weight_casts(linear, spy, grad=grad) for grad in (False, True, True)]
    assert counts == [1, 0, 0]


@pytest.mark.parametrize("name", RECIPES)
def test_weights_that_wait_packed_are_the_same_numbers(name: str) -> None:
    """What waits is asked for as what is saved, and one scale for a tensor makes one cast of it."""
    found = []
    for packed in (False, True):
        torch.manual_seed(1)
        spy, recipe = SpyBackend(), recipe_of(name)
        linear = build("column", recipe, backend=spy, packed_weights=packed)
        found.append(run(linear, *draw()))
        held = linear._cache._held
        asked = [c for c in spy.casts_of(linear.weight) if replace(c, saved=False) in held]
        assert all(cast.saved == packed for cast in asked)
    once = recipe.fprop.w.block == "tensor" and recipe.fprop.w.amax == "current"
    assert len(held) <= (1 if once else 2)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_an_edited_weight_is_cast_anew_without_being_told() -> None:
    """In place (an oscillation reset, an average of weights), or another tensor put in its place."""
    linear = build("row", recipe_of("nvfp4"))
    x, dy = draw()
    before = run(linear, x, dy)
    with torch.no_grad():
        linear.weight *= -2
    edited = run(linear, x, dy)
    assert torch.equal(edited["dx"], -2 * before["dx"])
    version = linear.weight._version
    linear.weight.data = linear.weight.detach().clone() * -0.5
    assert linear.weight._version == version
    replaced = run(linear, x, dy)
    assert torch.equal(replaced["y"], before["y"])


def test_no_more_than_two_casts_of_a_weight_are_held() -> None:
    """Old draws are let go, also where nobody says that the weight changed."""
    clock = Clock(SEED)
    spec = QuantSpec("mxfp4", rounding="stochastic")
    recipe = Recipe(Fprop(spec, spec), Dgrad(spec, spec), Wgrad(spec, spec))
    linear = build("column", recipe, clock=clock)
    for step in range(4):
        clock.step = step
        run(linear, *draw())
        assert len(linear._cache._held) == 2


def test_what_the_backward_pass_needs_is_saved_through_autograd() -> None:
    """Offloading sees every byte, a change in between is an error, and nothing outlives its use."""
    for name in ("bf16", "nvfp4"):
        linear = build("column", recipe_of(name))
        seen: list[int] = []

        def moved(t: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            seen.append(t.numel())
            return t.clone()

        x, dy = draw()
        expected = run(linear, x, dy)
        with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
            offloaded = run(linear, x, dy)
        assert all(torch.equal(expected[r], offloaded[r]) for r in expected)
        assert T * K in seen  # the operand of wgrad, not the weight alone
    linear = build("column", BF16)
    x, dy = draw()
    changed = x.detach().clone()
    y, _ = linear(changed.requires_grad_() * 1.0)
    y.backward(dy)  # untouched: fine
    held = x.detach() * 1.0
    y, _ = linear(held)
    held += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_dgrad_s_weight_of_one_microbatch_is_not_held_for_the_others() -> None:
    """With signs drawn for each GEMM, microbatches in flight would each hold a copy of the weight."""
    spy, clock = SpyBackend(), Clock(SEED)
    linear = build("column", recipe_of("mxfp4_rht_sr"), backend=spy, clock=clock)
    outputs = []
    for microbatch in range(3):
        clock.microbatch = microbatch
        outputs.append(linear(draw()[0])[0])
    assert not [c for c in spy.casts_of(linear.weight) if c.spec.quantized]
    for y in outputs:
        y.backward(draw()[1])
    assert len([c for c in spy.casts_of(linear.weight) if c.spec.quantized]) == 3


def test_a_changed_weight_is_cast_anew() -> None:
    clock = Clock(SEED)
    linear = build("row", recipe_of("mxfp8"), clock=clock)
    x, dy = draw()
    before = run(linear, x, dy)
    with torch.no_grad():
        linear.weight *= -2
    clock.weights_changed()
    after = run(linear, x, dy)
    assert torch.equal(after["y"], -2 * before["y"])
    assert torch.equal(after["dx"], -2 * before["dx"])


def test_another_recipe_is_another_cast_and_the_way_back_too() -> None:
    linear = build("row", recipe_of("nvfp4"))
    x, dy = draw()
    results = {}
    for name in ("nvfp4", "mxfp8", "bf16", "nvfp4"):
        linear.bound.recipe = recipe_of(name)
        found = run(linear, x, dy)
        fresh = build("row", recipe_of(name))
        with torch.no_grad():
            fresh.weight.copy_(linear.weight)
        expected = run(fresh, x, dy)
        assert all(torch.equal(found[r], expected[r]) for r in ("y", "dx", "dw"))
        results[name] = found["y"]
    assert not torch.equal(results["nvfp4"], results["mxfp8"])


def test_fresh_signs_are_another_cast_of_the_weight() -> None:
    """arXiv:2502.20586 draws signs for each GEMM, so dgrad's w is cast for each microbatch."""
    recipe, spy, clock = recipe_of("mxfp4_rht_sr"), SpyBackend(), Clock(SEED)
    linear = build("column", recipe, backend=spy, clock=clock)
    signs = set()
    for microbatch in range(3):
        clock.microbatch = microbatch
        weight_casts(linear, spy)
        (w,) = (c for c in spy.casts_of(linear.weight) if c.spec.quantized)
        signs.add(w.signs)
    assert len(signs) == 3


def test_bf16_operands_are_the_tensors_themselves() -> None:
    """A copy of w.T for each microbatch would be a second model in memory."""
    x = torch.randn(64, 32).bfloat16()
    for transpose in (False, True):
        (made,) = SpyBackend().quantize(x, [Cast(BF16.dgrad.w, transpose=transpose)])
        assert made.values.data_ptr() == x.data_ptr()
        assert torch.equal(made.values, x.t() if transpose else x)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_moment_replays_and_another_draws_anew(name: str) -> None:
    clock = Clock(SEED)
    linear = build("column", recipe_of(name), clock=clock)
    x, dy = draw()

    def when(step: int, microbatch: int) -> dict[str, torch.Tensor]:
        clock.step, clock.microbatch = step, microbatch
        clock.weights_changed()
        return run(linear, x, dy)

    first = when(3, 1)
    for step, microbatch in ((4, 1), (3, 2), (1, 3)):
        other = when(step, microbatch)
        assert torch.equal(other["y"], first["y"])  # both recipes' forward is deterministic
        assert not torch.equal(other["dx"], first["dx"])
        assert not torch.equal(other["dw"], first["dw"])
    again = when(3, 1)
    assert all(torch.equal(again[r], first[r]) for r in first)


@pytest.mark.parametrize("name", [*STOCHASTIC, "mxfp4_h16"])
def test_recompute_draws_the_noise_of_the_first_forward(name: str) -> None:
    """Even when other microbatches have started by then, as a pipeline's schedule does."""
    clock = Clock(SEED)
    linear = build("row", recipe_of(name), clock=clock)
    x, dy = draw()
    clock.step = 5

    def gradients(*, recompute: bool, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        x.grad = linear.weight.grad = None
        clock.microbatch = microbatch
        if recompute:
            y = tensor_parallel.checkpoint(lambda t: linear(t)[0], False, x)
        else:
            y, _ = linear(x)
        clock.microbatch = 9  # another microbatch is in flight
        y.backward(dy)
        assert clock.microbatch == 9
        return x.grad, linear.weight.grad

    plain, again = (gradients(recompute=r, microbatch=2) for r in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    if name in STOCHASTIC:
        other = gradients(recompute=True, microbatch=9)
        assert not any(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_an_unbound_linear_refuses_to_run() -> None:
    linear = build("column", BF16)
    linear.binding = None
    assert isinstance(linear, QuantLinear)
    with pytest.raises(RuntimeError, match="before bind"):
        linear(draw()[0])
