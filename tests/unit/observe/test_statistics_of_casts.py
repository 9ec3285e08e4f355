"""Statistics of casts equal numbers worked out by hand, and those of numerics' own measures."""

from __future__ import annotations

import math

import pytest
import torch

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.numerics import (
    Noise,
    QuantSpec,
    cosine,
    saturation_fraction,
    sqnr_db,
    underflow_fraction,
)
from fp4pretrain.numerics.scaling import operand_scales
from fp4pretrain.observe import statistics as st
from fp4pretrain.observe.sites import Selection, label
from fp4pretrain.observe.watcher import Watcher
from fp4pretrain.ops import Cast, Site, cast_operands, watching
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import BF16, Plan

SITE = Site(3, 3, "wgrad", "dy")
ALL = dict(statistics=st.STATISTICS, draws=4, device="cpu")


def observed(x: torch.Tensor, cast: Cast, *, backend=None, times: int = 1, **how) -> dict:
    """What a watcher says of one cast of x."""
    watcher = Watcher({label(cast.site): cast.site}, **(ALL | how))
    watching.attach(watcher)
    try:
        for _ in range(times):
            cast_operands(backend or ReferenceBackend(), x, [cast])
    finally:
        watching.detach()
    found = watcher.collect()
    return found[0] if found else {}


def test_a_block_by_hand() -> None:
    """INT-like E2M1 under E8M0 scales: amax 6 has scale 1, so 5 becomes 4 (ties to even), 0.1 becomes
    0, and 3 stays."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([6.0, 5.0, 0.1, 3.0])
    found = observed(x, Cast(QuantSpec("mxfp4"), SITE))
    signal, error = 36 + 25 + 0.01 + 9, 1 + 0.01
    assert found["site"] == "3.fc2.wgrad.dy"
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / error), rel=1e-5)
    assert found["underflow"] == pytest.approx(1 / 4)
    assert found["kurtosis"] == pytest.approx(
        32 * (6**4 + 5**4 + 1e-4 + 3**4) / signal**2, rel=1e-5
    )
    assert found["crest"] == pytest.approx(6 / math.sqrt(signal / 32), rel=1e-5)
    assert found["cosine"] == pytest.approx(
        (36 + 20 + 9) / math.sqrt(signal * (36 + 16 + 9)), rel=1e-5
    )
    assert found["scales"] == {"0": 1.0}
    assert found["saturation"] == found["inexact"] == found["amax_spread"] == 0


def test_spread_of_block_amaxes_and_scales_by_hand() -> None:
    """Blocks of amax 4, 16 and 64: log2 is 2, 4, 6, their standard deviation sqrt(8/3). A block of
    zeros has no amax; its smallest scale is counted with the scales."""
    x = torch.zeros(1, 4 * 32)
    for block, amax in enumerate((4.0, 16.0, 64.0)):
        x[0, 32 * block] = amax
    found = observed(x, Cast(QuantSpec("mxfp4"), SITE))
    assert found["amax_spread"] == pytest.approx(math.sqrt(8 / 3))
    assert {k: v for k, v in found["scales"].items() if int(k) > -100} == {
        "0": 0.25, "2": 0.25, "4": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("nvfp4"),
        QuantSpec("nvfp4", scale="four_over_six"),
        QuantSpec("ue5m3"),
        QuantSpec("mxfp4"),
        QuantSpec("fp8_e4m3", "tensor"),
    ],
    ids=lambda spec: f"{spec.format} {spec.scale}",
)
def test_numbers_are_those_of_the_measures(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96) * torch.exp(2 * torch.randn(64, 1))
    cast = Cast(spec, SITE)
    y = cast_operands(ReferenceBackend(), x, [cast])[0].dequantize()
    found = observed(x, cast)
    assert found["sqnr_db"] == pytest.approx(float(sqnr_db(x, y)), rel=1e-5)
    assert found["cosine"] == pytest.approx(float(cosine(x, y)), rel=1e-5)
    assert found["underflow"] == pytest.approx(float(underflow_fraction(x, y)), rel=1e-5)
    assert found["saturation"] == pytest.approx(float(saturation_fraction(x, cast.spec)), abs=1e-7)
    # twice the same tensor is the same distribution
    assert observed(x, cast, times=2)["sqnr_db"] == pytest.approx(found["sqnr_db"])


def test_scales_are_counted_by_their_value_not_by_their_code() -> None:
    """UE5M3 keeps a byte: scales of 2^3 and 2^5 are the codes 144 and 160."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 6 * 2.0**3, 6 * 2.0**5
    spec = QuantSpec("ue5m3", amax="fixed", amax_value=6 * 61440.0)  # so that the outer scale is 1
    stored = operand_scales(x, spec, torch.tensor(6 * 61440.0)).stored
    found = st.octaves(stored).tolist()
    assert [found[power - st.LOWEST] for power in (3, 5)] == [1.0, 1.0] and sum(found) == 2


def test_kurtosis_of_gradients_whose_fourth_power_fp32_cannot_hold() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 64)
    expected = observed(x, Cast(QuantSpec("mxfp4"), SITE))["kurtosis"]
    assert observed(x * 2**-50, Cast(QuantSpec("mxfp4"), SITE))["kurtosis"] == pytest.approx(
        expected
    )
    assert expected == pytest.approx(3, abs=0.3)


def test_stochastic_rounding_has_no_bias_and_nearest_draws_nothing() -> None:
    """Bias falls with draws, where the deviation stays; clipping at 3/4 of amax would be a bias."""
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    spec = QuantSpec("mxfp4", rounding="stochastic_full", scale="ceil")
    found = observed(x, Cast(spec, SITE, noise=Noise(7)), draws=64)
    assert found["draw_deviation"] > 0.05
    assert found["draw_bias"] < 0.1 * found["draw_deviation"]
    assert "draw_bias" not in observed(x, Cast(QuantSpec("mxfp4"), SITE))
    clipped = QuantSpec("mxfp4", rounding="stochastic_full", scale="floor")
    assert observed(x, Cast(clipped, SITE, noise=Noise(7)), draws=64)["draw_bias"] > 0.03


def test_inexact_counts_what_a_backend_made_otherwise() -> None:
    class Off(ReferenceBackend):
        pass

    backend = Off()
    make = backend.quantize

    def three_wrong(*args, **kwargs):
        (operand,) = make(*args, **kwargs)
        operand.values[0, :3] += 1
        return [operand]

    class Wrapped:
        quantize = staticmethod(three_wrong)

    torch.manual_seed(0)
    found = observed(torch.randn(4, 32), Cast(QuantSpec("mxfp4"), SITE), backend=Wrapped())
    assert found["inexact"] == pytest.approx(3 / 128)


@pytest.mark.parametrize("order", ["x first", "dy first", "two in flight"])
def test_gradient_against_its_noise_by_hand(order: str) -> None:
    """dW and its error over all microbatches, whichever operand is cast first and however many wait."""
    torch.manual_seed(0)
    spec = QuantSpec("mxfp4")
    casts = {
        name: Cast(spec, Site(0, 0, "wgrad", name), transpose=True, rotation_size=32)
        for name in ("dy", "x")
    }
    dys, xs = torch.randn(2, 64, 16), torch.randn(2, 64, 24)
    backend = ReferenceBackend()
    calls = [("x", xs[0]), ("dy", dys[0]), ("x", xs[1]), ("dy", dys[1])]
    if order == "dy first":
        calls = [calls[i] for i in (1, 0, 3, 2)]
    elif order == "two in flight":
        calls = [calls[i] for i in (0, 2, 1, 3)]
    sites = {label(c.site): c.site for c in casts.values()}
    watcher = Watcher(sites, ["gradient_noise"], draws=2, device="cpu")
    watching.attach(watcher)
    try:
        for name, tensor in calls:
            cast_operands(backend, tensor, [casts[name]])
    finally:
        watching.detach()
    (found,) = [one for one in watcher.collect() if "gradient_to_noise" in one]
    true = sum(dy.t() @ x for dy, x in zip(dys, xs, strict=True))
    made = sum(
        backend.quantize(dy, [casts["dy"]])[0].dequantize()
        @ backend.quantize(x, [casts["x"]])[0].dequantize().t()
        for dy, x in zip(dys, xs, strict=True)
    )
    # the rotated tensors are held in BF16, which the gradient by hand is not
    expected = float(true.norm() / (math.sqrt(3) * (made - true).norm()))
    assert found["gradient_to_noise"] == pytest.approx(expected, rel=0.02)


def test_oscillation_is_a_cast_that_moves_more_than_its_weight() -> None:
    """Of 32 weights under one scale, one swings by 0.02 around the boundary 2.5 between 2 and 3."""
    site = Site(0, 0, "fprop", "w")
    watcher = Watcher({"w": site}, ["oscillation"], draws=2, device="cpu")
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 6.0, 1.0
    watching.attach(watcher)
    try:
        for step in range(5):
            w[0, 2] = 2.49 if step % 2 else 2.51
            w[0, 1] += 0.5 * (step == 2)  # moves as far as its cast
            cast_operands(ReferenceBackend(), w, [Cast(QuantSpec("mxfp4"), site)])
            found = watcher.collect()
    finally:
        watching.detach()
    assert found == [{"site": "w", "oscillation": pytest.approx(1 / 32)}]


def test_a_selection_is_refused_by_its_key() -> None:
    plan = Plan(BF16, 4)
    words = dict(
        linears=["fc2"], gemms=["wgrad"], operands=["x"], statistics=["sqnr"], blocks="0:2"
    )
    assert Selection(**words).sites(plan) == {}  # nothing is ever quantized
    for key, value in (("linears", ["fc3"]), ("gemms", []), ("operands", ["y"]), ("blocks", "a")):
        with pytest.raises(UserError, match=f"^observe.{key}"):
            Selection(**(words | {key: value}))


def test_a_projection_is_seen_where_it_is_multiplied() -> None:
    """In the whole matrix, or in the part of it that the plan made."""
    words = dict(linears=["q"], gemms=["fprop"], operands=["x"], statistics=["sqnr"], blocks="0:1")
    for recipe, seen in (("nvfp4_all", "0.qkv.fprop.x"), ("nvfp4_qk_mxfp8", "0.qk.fprop.x")):
        plan = plan_of(compose([f"precision={recipe}"]))
        assert list(Selection(**words).sites(plan)) == [seen]


def test_two_watches_are_refused() -> None:
    watching.attach(lambda seen: None)
    try:
        with pytest.raises(RuntimeError):
            watching.attach(lambda seen: None)
    finally:
        watching.detach()
