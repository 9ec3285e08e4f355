"""The law behind layout-independent noise: casting the shards of a tensor, each with the whole
tensor's amax, and putting them together is casting the whole, bit for bit, for every operand of
both parallel kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import Cast, LinearCasts, Moment, Shard, Site, linear_casts
from fp4pretrain.ops.reference import EmulatedOperand, ReferenceBackend
from fp4pretrain.precision import Dgrad, Fprop, Recipe, Rotation, Wgrad

T, N, K = 64, 256, 128
MOMENT = Moment(seed=1, step=2, microbatch=3)
PLACE = dict(layer=4, linear=2)
BACKEND = ReferenceBackend()


def everywhere(spec: QuantSpec, w: QuantSpec | None = None, rotation: Rotation | None = None):
    w, rotation = w or spec, rotation or Rotation()
    return Recipe(Fprop(spec, w, rotation), Dgrad(spec, w, rotation), Wgrad(spec, spec, rotation))


SR = QuantSpec("nvfp4", rounding="stochastic")
RECIPES = {
    "nvfp4 8 bits": everywhere(SR, QuantSpec("nvfp4", block="2d", rounding="stochastic")),
    "nvfp4 24 bits": everywhere(QuantSpec("nvfp4", rounding="stochastic_full", scale="unbiased")),
    "mxfp4, rotated": everywhere(
        QuantSpec("mxfp4", rounding="stochastic", scale="unbiased"),
        rotation=Rotation("random_hadamard", 16, "gemm"),
    ),
    "nvfp4, rotated": everywhere(SR, rotation=Rotation("random_hadamard", 32, "step")),
    "fp8, one scale a tensor": everywhere(QuantSpec("fp8_e4m3")),
    "fp8, one scale a row": everywhere(QuantSpec("fp8_e4m3", "row")),
}


def shards(parallel: str, ranks: int, stride: int) -> list[tuple[Shard, torch.Tensor]]:
    """Each rank's placement and the global indices (of n or k) that it holds.

    ``stride`` 2 is SwiGLU's first linear: a rank holds a piece of the gate and one of the up half.
    """
    size = N if parallel == "column" else K
    part = size // ranks // stride
    index = torch.arange(size).view(stride, ranks, part)
    found = []
    for rank in range(ranks):
        place = (rank * part, part if stride > 1 else 0, size // stride - part if stride > 1 else 0)
        shard = Shard("column", n=place, split=True)
        if parallel == "row":
            shard = Shard("row", k=place, split=True)
        found.append((shard, index[:, rank].reshape(-1)))
    return found


def tensors() -> dict[str, torch.Tensor]:
    """x, w, dy in BF16 with an outlier that only one rank holds: a local amax would show."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in (("x", (T, K)), ("w", (N, K)), ("dy", (T, N))):
        out[name] = torch.randn(shape, generator=generator).bfloat16()
        out[name][3, 5] = 37.0
    return out


def split_axis(parallel: str, name: str) -> int | None:
    """The axis of x [t, k], w [n, k], dy [t, n] that is sharded."""
    return {
        "column": {"x": None, "w": 0, "dy": 1},
        "row": {"x": 1, "w": 1, "dy": None},
    }[parallel][name]


def casts_of(casts: LinearCasts, name: str) -> list[Cast]:
    """The two casts of one tensor, which are made from one read."""
    return {
        "x": [casts.fprop_x, casts.wgrad_x],
        "w": [casts.fprop_w, casts.dgrad_w],
        "dy": [casts.dgrad_dy, casts.wgrad_dy],
    }[name]


def cast_shards(
    parts: Sequence[torch.Tensor], casts: Sequence[Sequence[Cast]]
) -> list[list[EmulatedOperand]]:
    """What the ranks get when their amaxes are all-reduced: first all amaxes, then the casts."""
    seen: list[Sequence[torch.Tensor]] = []

    def note(amaxes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        seen.append(amaxes)
        return amaxes

    for x, c in zip(parts, casts, strict=True):
        BACKEND.quantize(x, c, note)
    whole = [torch.stack(same).amax(0) for same in zip(*seen, strict=True)]
    return [BACKEND.quantize(x, c, lambda _: whole) for x, c in zip(parts, casts, strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("parallel, stride", [("column", 1), ("column", 2), ("row", 1)])
@pytest.mark.parametrize("name", RECIPES)
def test_shards_cast_apart_are_the_whole_cast_once(
    name: str, parallel: str, stride: int, ranks: int
) -> None:
    recipe = RECIPES[name]
    whole_casts = linear_casts(recipe, MOMENT, Shard(parallel), **PLACE)
    placed = shards(parallel, ranks, stride)
    rank_casts = [linear_casts(recipe, MOMENT, shard, **PLACE) for shard, _ in placed]
    for tensor, x in tensors().items():
        axis = split_axis(parallel, tensor)
        whole = BACKEND.quantize(x, casts_of(whole_casts, tensor))
        if axis is None:  # every rank holds it whole, and draws the same
            for casts in rank_casts:
                assert casts_of(casts, tensor) == casts_of(whole_casts, tensor)
                assert not any(c.shared for c in casts_of(casts, tensor))
            continue
        parts = [x.index_select(axis, held) for _, held in placed]
        made = cast_shards(parts, [casts_of(c, tensor) for c in rank_casts])
        for number, operand in enumerate(whole):
            transposed = casts_of(whole_casts, tensor)[number].transpose
            for (_, held), operands in zip(placed, made, strict=True):
                expected = operand.values.index_select(1 - axis if transposed else axis, held)
                assert torch.equal(operands[number].values, expected), (tensor, number)
                alpha = operand.alpha
                if alpha.dim() and transposed == (axis == 1):  # one a row, and rows are sharded
                    alpha = alpha.index_select(0, held)
                assert torch.equal(operands[number].alpha, alpha)


def test_without_its_placement_a_shard_draws_other_noise() -> None:
    """So the law can fail: rank 1 placed at 0 is wrong for every sharded stochastic operand."""
    recipe, ((_, _), (_, held)) = RECIPES["nvfp4 8 bits"], shards("column", 2, 1)
    at_zero = linear_casts(recipe, MOMENT, Shard("column", split=True), **PLACE)
    for tensor in ("w", "dy"):
        x, axis = tensors()[tensor], split_axis("column", tensor)
        whole = BACKEND.quantize(x, casts_of(at_zero, tensor))
        amax = [torch.tensor(37.0)] * 2
        part = BACKEND.quantize(
            x.index_select(axis, held), casts_of(at_zero, tensor), lambda _, a=amax: a
        )
        for number, transposed in ((0, False), (1, True)):
            expected = whole[number].values.index_select(1 - axis if transposed else axis, held)
            assert not torch.equal(part[number].values, expected)


def test_every_operand_of_every_moment_has_a_stream_of_its_own() -> None:
    seen = {}
    for seed, step, microbatch, layer, linear in [
        (1, 0, 0, 0, 0), (2, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 0, 1, 0, 0), (1, 0, 0, 1, 0),
        (1, 0, 0, 0, 1),
    ]:  # fmt: skip
        moment = Moment(seed, step, microbatch)
        for gemm, operands in (("fprop", "x w"), ("dgrad", "dy w"), ("wgrad", "dy x")):
            for operand in operands.split():
                place = (seed, step, microbatch, layer, linear, gemm, operand)
                seen[place] = moment.noise(Site(layer, linear, gemm, operand)).key
    # A weight is cast once a step, so its two operands draw the same in the second microbatch.
    shared = [p for p in seen if p[2] == 1 and p[-1] == "w"]
    assert len(shared) == 2
    for place in shared:
        assert seen.pop(place) == seen[(*place[:2], 0, *place[3:])]
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize(
    "resample, same",
    [
        ("never", {"step", "microbatch", "layer", "linear", "gemm"}),
        ("layer", {"step", "microbatch", "gemm"}),
        ("step", {"microbatch", "layer", "linear", "gemm"}),
        ("gemm", set()),
    ],
)
def test_signs_are_redrawn_as_often_as_the_rotation_says(resample: str, same: set[str]) -> None:
    rotation = Rotation("random_hadamard", 64, resample)
    base = dict(seed=1, step=2, microbatch=3, layer=4, linear=1, gemm="wgrad", operand="dy")

    def drawn(**changes: Any) -> tuple[int, ...] | None:
        at = base | changes
        moment = Moment(*(at[key] for key in ("seed", "step", "microbatch")))
        return moment.signs(Site(at["layer"], at["linear"], at["gemm"], at["operand"]), rotation)

    signs = drawn()
    assert signs is not None and len(signs) == 64 and set(signs) == {-1, 1}
    assert signs == drawn() == drawn(operand="x")  # both operands of a GEMM
    for key in ("step", "microbatch", "layer", "linear"):
        assert (drawn(**{key: 7}) == signs) == (key in same), key
    assert (drawn(gemm="dgrad") == signs) == ("gemm" in same)
    assert drawn(seed=9) != signs


def test_fixed_and_absent_signs() -> None:
    site = Site(0, 0, "wgrad", "x")
    assert MOMENT.signs(site, Rotation()) is None
    assert MOMENT.signs(site, Rotation("hadamard", 16)) is None
    te = MOMENT.signs(site, Rotation("random_hadamard", 16, signs="te"))
    # Transformer Engine's: numerics.md
    assert te == (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
