"""precision.backend=transformer_engine through a stand-in on a CPU (the package needs a GPU: tests/gpu):
which casts and GEMMs it takes, that operands and products are the reference's, whose noise it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import engine_standin
import pytest
import torch
from torch import Tensor

from fp4pretrain.bench.linear import casts_of
from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.numerics import Noise, QuantSpec
from fp4pretrain.ops import Cast, choice, choose, engine_backend
from fp4pretrain.ops.engine_backend import EngineBackend
from fp4pretrain.ops.engine_check import why_wrong
from fp4pretrain.ops.engine_operand import EngineOperand
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import OPERANDS, Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, BLACKWELL = (9, 0), (10, 0)
RECIPES = ("bf16", "fp8", "fp8_delayed", "fp8_block", "mxfp8", "nvfp4", "nvfp4_no_sr")


@pytest.fixture(autouse=True)
def _standin(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_standin.install(monkeypatch)
    monkeypatch.setattr(engine_backend, "why_no_engine", lambda: None)


def _recipe(name: str) -> Recipe:
    return plan_of(compose(["model=tiny", f"precision={name}"])).recipe


def _tensors(t: int, k: int, n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    made = {}
    for name, shape in (("x", (t, k)), ("w", (n, k)), ("dy", (t, n))):
        made[name] = torch.randn(shape, generator=g)
        made[name][:, ::29] *= 20
    return {name: x.bfloat16() for name, x in made.items()}


def _nearest(cast: Cast) -> bool:
    return not cast.spec.stochastic


@pytest.mark.parametrize("shape", [(256, 128, 384), (72, 56, 40)])  # whole blocks; padded
@pytest.mark.parametrize(
    ("name", "both_ways"),
    [*((name, False) for name in RECIPES), ("fp8", True), ("fp8_delayed", True)],
)
def test_operands_and_products_are_the_reference_s(
    name: str, both_ways: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_standin.Float8CurrentScalingQuantizer, "reads_both_ways", both_ways)
    recipe, tensors = _recipe(name), _tensors(*shape)
    casts = casts_of(recipe)
    mine, ours = EngineBackend(), ReferenceBackend()
    made: dict[str, EngineOperand] = {}
    for tensor, x in tensors.items():
        both = {where: c for where, c in casts.items() if where.endswith(f".{tensor}")}

        def answer(amaxes: Any) -> Any:
            return [a * 1.75 for a in amaxes]

        asked = answer if any(c.asks for c in both.values()) else None
        theirs = mine.quantize(x, list(both.values()), asked)
        want = ours.quantize(x, list(both.values()), asked)
        for (where, cast), a, b in zip(both.items(), theirs, want, strict=True):
            made[where] = a.filled(a.tensors())
            cols = min(a.shape[1], b.shape[1])
            assert not a.dequantize()[:, cols:].any() and a.shape[0] == b.shape[0]
            if _nearest(cast):
                assert torch.equal(a.dequantize()[:, :cols], b.dequantize()[:, :cols]), where
    for gemm, (left, right) in OPERANDS.items():
        a, b = made[f"{gemm}.{left}"], made[f"{gemm}.{right}"]
        want_product = a.dequantize() @ b.dequantize().t()
        got = mine.gemm(a, b, out_dtype=torch.float32)
        assert got.is_contiguous() and torch.allclose(got, want_product, rtol=1e-4, atol=1e-3)
        main = torch.ones_like(want_product)
        added = mine.gemm(a, b, out_dtype=torch.float32, accumulate_into=main)
        assert added is main and torch.allclose(main, want_product + 1, rtol=1e-4, atol=1e-3)


def test_a_layout_that_its_gemm_lacks_is_multiplied_the_other_way_round() -> None:
    x, y = _tensors(48, 32, 64)["x"], _tensors(48, 32, 64)["dy"]
    mine = EngineBackend()
    columns = mine.quantize(x, [Cast(QuantSpec(), transpose=True)])[0]  # [32, 48] as columns
    rows = mine.quantize(y.t().contiguous(), [Cast(QuantSpec())])[0]  # [64, 48]
    main = torch.zeros(32, 64)
    for got in (
        mine.gemm(columns, rows, out_dtype=torch.float32),
        mine.gemm(columns, rows, out_dtype=torch.float32, accumulate_into=main),
    ):
        assert torch.allclose(got, x.float().t() @ y.float(), rtol=1e-5, atol=1e-4)
    turned = rows.transposed()
    assert turned is not None and torch.equal(turned.dequantize(), y.float())


def test_empty_tensors_multiply_to_zeros() -> None:
    mine = EngineBackend()
    w = mine.quantize(_tensors(16, 32, 64)["w"], [Cast(QuantSpec("fp8_e4m3", "tensor"))])[0]
    x = mine.quantize(torch.zeros(0, 32).bfloat16(), [Cast(QuantSpec("fp8_e4m3", "tensor"))])[0]
    assert mine.gemm(x, w, out_dtype=torch.bfloat16).shape == (0, 64)
    main = torch.ones(64, 32)
    none = EngineOperand("bf16", "bf16", torch.zeros(64, 0), (64, 0))
    other = EngineOperand("bf16", "bf16", torch.zeros(32, 0), (32, 0))
    assert mine.gemm(none, other, out_dtype=torch.float32, accumulate_into=main) is main
    assert (main == 1).all()


@pytest.mark.parametrize("largest", [0.0, float("inf"), float("nan"), 1e-40, 3.5])
def test_a_given_amax_scales_as_ours(largest: float) -> None:
    """Also where it is no magnitude: ours is NaN then, and so is this, though its own scale is 1."""
    x = _tensors(32, 48, 16)["x"]
    cast = Cast(QuantSpec("fp8_e5m2", "tensor", amax="fixed", amax_value=1.0))
    pair = [b.quantize(x, [cast], lambda _: [torch.tensor(largest)])[0].dequantize()
            for b in (EngineBackend(), ReferenceBackend())]  # fmt: skip
    assert torch.equal(pair[0].nan_to_num(7.0), pair[1].nan_to_num(7.0))


def test_noise_is_seeded_by_the_site_and_the_generator_is_left_alone() -> None:
    x = _tensors(64, 64, 32)["x"]
    spec = QuantSpec("nvfp4", rounding="stochastic")
    mine, generator = EngineBackend(), torch.cuda.default_generators[0]

    def drawn(key: int, *others: Cast) -> Tensor:
        return mine.quantize(x, [*others, Cast(spec, noise=Noise(key))])[-1].dequantize()

    before = generator.get_state()
    first = drawn(2**63 + 11)
    assert torch.equal(generator.get_state(), before)
    generator.manual_seed(99)
    again = drawn(2**63 + 11, Cast(spec, transpose=True, noise=Noise(4)))
    assert torch.equal(first, again) and not torch.equal(first, drawn(12))


REFUSED_CASTS = [
    (dict(format="mxfp4"), "no cast for format=mxfp4"),
    (dict(format="fp8_e4m3", block="row"), "no cast for format=fp8_e4m3 block=row"),
    (dict(format="mxfp8", scale="floor"), "scale=floor: Transformer Engine's mxfp8 has rceil alone"),
    (dict(format="nvfp4", scale="four_over_six"), "scale=four_over_six"),
    (dict(format="nvfp4", rounding="stochastic_full"), "rounding=stochastic_full"),
    (dict(format="nvfp4", ties="away"), "ties=away"),
    (dict(format="nvfp4", amax="delayed"), "amax=delayed"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), REFUSED_CASTS)
def test_casts_that_it_has_not_are_refused_by_key(fields: dict[str, Any], reason: str) -> None:
    said = EngineBackend().why_not_cast(QuantSpec(**fields), CUDA)
    assert said is not None and reason in said and "\n" not in said


REFUSED = [
    ("fp8", HOPPER, None),
    ("fp8_delayed", HOPPER, None),
    ("fp8_block", HOPPER, None),
    ("bf16", (8, 0), None),
    ("fp8", (8, 0), "FP8 tensor cores"),
    ("fp8_block", (8, 9), "blocks of 128 on Hopper"),
    ("fp8_block", BLACKWELL, "as MXFP8; use scale=pow2"),
    ("mxfp8", HOPPER, "mxfp8 on Blackwell alone"),
    ("mxfp8", BLACKWELL, None),
    ("nvfp4", HOPPER, "nvfp4 on Blackwell alone"),
    ("nvfp4", BLACKWELL, None),
    ("nvfp4_mxfp8_bwd", BLACKWELL, None),
    ("quartet2", BLACKWELL, "rotation: Transformer Engine rotates wgrad"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "capability", "reason"), REFUSED)
def test_it_takes_what_it_computes_and_says_of_others_why_not(
    name: str, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself is made on the CPU: the stand-in has no GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(engine_backend, "why_wrong", lambda b, g, _: why_wrong(b, g, CPU))
    monkeypatch.setattr(choice, "without_triton", lambda: "absent")
    plan = plan_of(compose(["model=tiny", f"precision={name}"]))
    if reason is None:
        chosen, why = choose("transformer_engine", plan, CUDA)
        assert chosen.name == "transformer_engine" and "Transformer Engine, cuBLASLt" in why
        assert ("its own noise" in why) == any(s.stochastic for _, _, s in plan.recipe.operands())
        return
    with pytest.raises(UserError) as refusal:
        choose("transformer_engine", plan, CUDA)
    said = str(refusal.value)
    assert said.startswith("precision.backend: transformer_engine cannot run this recipe on cuda")
    assert reason in said and "\n" not in said


def test_auto_never_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineBackend, "why_not", lambda *_: None)
    chosen, why = choose("auto", plan_of(compose(["model=tiny", "precision=fp8"])), CPU)
    assert chosen.name in ("cpp", "reference") and "transformer_engine" not in why


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_backend, "why_no_engine", lambda: "Transformer Engine: pip install it"
    )
    with pytest.raises(UserError, match=r"\(no Transformer Engine: pip install it\)"):
        choose("transformer_engine", plan_of(compose(["model=tiny", "precision=fp8"])), CUDA)


BROKEN = [
    ("fp8", "cast", "elements differ from ours"),
    ("nvfp4", "to nearest", "wrong on average"),
    ("fp8", "halves", "product of a self-check"),
    ("fp8", "raises", "raised RuntimeError: no algorithm"),
]


@pytest.mark.parametrize(("name", "how", "reason"), BROKEN)
def test_a_release_that_computes_something_else_is_refused(
    name: str, how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "cast":
        cast = engine_standin.Float8CurrentScalingQuantizer.cast

        def off(self: Any, x: Tensor) -> Any:
            made = cast(self, x)
            made._scale_inv = made._scale_inv * 1.000001
            return made

        monkeypatch.setattr(engine_standin.Float8CurrentScalingQuantizer, "cast", off)
    elif how == "to nearest":
        rounded = engine_standin.NVFP4Quantizer.cast
        monkeypatch.setattr(
            engine_standin.NVFP4Quantizer,
            "cast",
            lambda self, x: rounded(replace(self, stochastic_rounding=False), x),
        )
    else:
        import transformer_engine.pytorch.cpp_extensions as extensions

        def gemm(*operands: Any, **how_to: Any) -> tuple:
            if how == "raises":
                raise RuntimeError("no algorithm")
            made = engine_standin.general_gemm(*operands, **how_to)
            return (made[0].mul_(0.5), *made[1:])

        monkeypatch.setattr(extensions, "general_gemm", gemm)
    gemm_ = _recipe(name).dgrad
    said = why_wrong(EngineBackend(), gemm_, CPU)
    assert said is not None and reason in said


def test_shards_cannot_share_an_amax_that_it_measures_itself() -> None:
    cast = Cast(QuantSpec("nvfp4"), shared=True)
    with pytest.raises(UserError, match=r"^precision\.backend: .* use precision\.amax=rank"):
        EngineBackend().quantize(_tensors(32, 32, 32)["x"], [cast], lambda a: a)
