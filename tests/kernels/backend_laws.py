"""The Triton backend against the reference backend on one GPU: what both tests and scripts check.

Operands must dequantize to the same numbers. Products are held to float64 products of those operands by
what the order of additions can do: FP32 accumulation of k products errs by at most k * 2^-24 of the sum
of their magnitudes; Hopper's FP8 tensor cores keep 13 bits behind the leading one and cut at each of k / 32
additions, the running sum and the products aligned to it: at all of them where the sum is fast, otherwise
at four, after which it goes to FP32. BF16 results add half an ulp, 2^-9.
"""

from __future__ import annotations

from typing import Any

import torch

from fp4pretrain.bench.linear import casts_of
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import Backend, Cast, Moment, Shard, linear_casts
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.ops.triton_backend import TritonBackend, TritonOperand
from fp4pretrain.ops.triton_operand import product
from fp4pretrain.precision import OPERANDS, Dgrad, Fprop, Recipe, Rotation, Wgrad


def _recipe(spec: dict[str, Any], fast: tuple = (), **changes: dict[str, Any]) -> Recipe:
    """All six operands ``spec``; changes by gemm_operand; rotations by gemm name; fast sums."""

    def of(name: str) -> QuantSpec:
        return QuantSpec(**spec | changes.get(name, {}))

    def turn(name: str) -> Rotation:
        return Rotation(**changes.get(name, {}))

    return Recipe(
        Fprop(of("fprop_x"), of("fprop_w"), turn("fprop"), "fprop" in fast),
        Dgrad(of("dgrad_dy"), of("dgrad_w"), turn("dgrad"), "dgrad" in fast),
        Wgrad(of("wgrad_dy"), of("wgrad_x"), turn("wgrad"), "wgrad" in fast),
    )


SR = dict(rounding="stochastic")
H16 = dict(kind="hadamard", size=16, dtype="fp32")
RECIPES = {
    "bf16": Recipe(),
    # arXiv:2509.25149
    "nvfp4": _recipe(
        dict(format="nvfp4"), fprop_w=dict(block="2d"), dgrad_w=dict(block="2d"),
        dgrad_dy=SR, wgrad_dy=SR, wgrad=dict(kind="random_hadamard", size=16, signs="te"),
    ),
    # arXiv:2605.09825
    "mxfp4": _recipe(
        dict(format="mxfp4", scale="even"), ("fprop", "dgrad"), fprop=H16, dgrad=H16, wgrad=H16
    ),
    "mxfp4 2d": _recipe(
        dict(format="mxfp4"), fprop_w=dict(block="2d"), dgrad_w=dict(block="2d")
    ),
    # arXiv:2502.20586
    "mxfp4 unbiased": _recipe(
        dict(format="mxfp4", scale="unbiased", **SR),
        dgrad=dict(kind="random_hadamard", size=64), wgrad=dict(kind="random_hadamard", size=64),
    ),
    "mxfp8": _recipe(dict(format="mxfp8", scale="rceil")),
    "fp8": _recipe(
        dict(format="fp8_e4m3"), ("fprop",),
        dgrad_dy=dict(format="fp8_e5m2"), wgrad_dy=dict(format="fp8_e5m2"),
    ),
    "fp8 row": _recipe(dict(format="fp8_e4m3", block="row"), ("fprop", "dgrad", "wgrad")),
    # arXiv:2412.19437
    "fp8 block": _recipe(
        dict(format="fp8_e4m3", block="1d"), fprop_w=dict(block="2d"), dgrad_w=dict(block="2d")
    ),
}  # fmt: skip


def check_recipe(
    name: str,
    shape: tuple[int, int, int] = (512, 256, 384),
    *,
    backend: TritonBackend | None = None,
) -> list[str]:
    """What differs between the backends on x [t, k], w [n, k], dy [t, n]; nothing if all is well.

    ``backend``: the one held to the reference; default the Triton backend as ``auto`` makes it.
    """
    t, k, n = shape
    g = torch.Generator("cuda").manual_seed(3)

    def draw(rows: int, cols: int) -> torch.Tensor:
        x = torch.randn(rows, cols, device="cuda", generator=g)
        x[:, ::29] *= 20
        return x.bfloat16()

    x, w, dy = draw(t, k), draw(n, k), draw(t, n)
    recipe = RECIPES[name]
    mine, reference = backend or TritonBackend(), ReferenceBackend()
    casts = casts_of(recipe)
    made: dict[str, TritonOperand] = {}
    bad: list[str] = []
    pairs = {"w": (w, "fprop.w", "dgrad.w"), "x": (x, "fprop.x", "wgrad.x")}
    pairs["dy"] = (dy, "dgrad.dy", "wgrad.dy")
    partner = {"fprop.x": "fprop.w", "dgrad.dy": "dgrad.w", "wgrad.dy": "wgrad.x"}
    for tensor, first, second in pairs.values():
        both = [casts[first], casts[second]]
        partners = [made.get(partner.get(one, "")) for one in (first, second)]
        for operand, a, b in zip(
            (first, second),
            mine.quantize(tensor, both, None, partners),
            reference.quantize(tensor, both),
            strict=True,
        ):
            made[operand] = a
            bad += _operands_differ(operand, a, b)
    if any(mine.counters([recipe], x.device).values()):
        bad.append(f"lost exactness: {mine.counters([recipe], x.device)}")
    for gemm, operands in OPERANDS.items():
        left, right = (made[f"{gemm}.{operand}"] for operand in operands)
        bad += alphas_differ(gemm, left, right)
        fast = recipe.gemm(gemm).fast_accum
        bad += _products_differ(gemm, mine, left, right, fast=fast, accumulate=gemm == "wgrad")
    return bad


def sums_error(
    backend: Backend, k: int, *, one_sign: bool, fast: bool, rows: int = 2048, device: str = "cuda"
) -> tuple[float, float]:
    """Relative errors of x [rows, k] @ w [rows, k].T in E4M3, from N(0, 1) or its magnitudes: of the
    sums, against float64 products of the same operands; and of those against x's and w's own."""
    g = torch.Generator(device).manual_seed(k)
    x, w = (torch.randn(rows, k, device=device, generator=g) for _ in range(2))
    if one_sign:
        x, w = x.abs(), w.abs()
    cast = [Cast(QuantSpec("fp8_e4m3", "tensor"))]
    a, b = (backend.quantize(v, cast)[0] for v in (x, w))
    ra, rb = (ReferenceBackend().quantize(v, cast)[0] for v in (x, w))
    exact = ra.values.double() @ rb.values.double().t() * ra.alpha.double() * rb.alpha.double()
    own = x.double() @ w.double().t()
    sums = backend.gemm(a, b, out_dtype=torch.float32, fast_accum=fast).double()
    return _relative(sums, exact), _relative(exact, own)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def plain_values(a: TritonOperand) -> torch.Tensor:
    """fp32 values without the tensor scale."""
    a = a.expanded()
    values = a.data.float()
    if a.blocks is not None:
        tall = 1 if a.blocks.shape[0] == a.shape[0] else 128
        factors = a.blocks.repeat_interleave(tall, 0)[: a.shape[0]]
        return values * factors.repeat_interleave(128, 1)
    return values if a.factors is None else values * a.factors[:, None]


def check_operands(
    name: str,
    shape: tuple[int, int, int],
    *,
    parallel: str,
    backend: TritonBackend,
    device: str = "cpu",
) -> list[str]:
    """Operands of a shard of a linear, column or row parallel: what differs from the reference's.

    The shard is not the first, so noise has offsets (a row and a column one, which must not change
    places) and gaps; and its amaxes are replaced by larger ones of the whole tensor.
    """
    t, k, n = shape
    g = torch.Generator().manual_seed(7)
    tensors = {
        key: (torch.randn(size, generator=g) * 3).bfloat16().to(device)
        for key, size in (("x", (t, k)), ("w", (n, k)), ("dy", (t, n)))
    }
    shard = {
        "column": Shard("column", n=(96, 32, 160), split=True),
        "row": Shard("row", k=(128, 0, 0), split=True),
    }[parallel]
    bad: list[str] = []
    casts = linear_casts(RECIPES[name].interned(), Moment(1, 2, 3), shard, layer=4, linear=1)
    for key, tensor in tensors.items():
        mine: list[torch.Tensor] = []
        theirs: list[torch.Tensor] = []
        both = [c for where, c in casts.all().items() if where.endswith(f".{key}")]
        made = backend.quantize(tensor, both, lambda a, seen=mine: _larger(a, seen))
        want = ReferenceBackend().quantize(tensor, both, lambda a, seen=theirs: _larger(a, seen))
        same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
        bad += [] if same else [f"{key}: other amaxes are shared"]
        for cast, a, b in zip(both, made, want, strict=True):
            bad += _operands_differ(str(cast.site), a, b)
    return bad


def _larger(amaxes: Any, seen: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an all-reduce gives where another rank has 1.75 times as much."""
    seen += [a.clone() for a in amaxes]
    return [a * 1.75 for a in amaxes]


def _operands_differ(name: str, a: TritonOperand, b: Any) -> list[str]:
    mine, theirs = a.dequantize(), b.dequantize()
    cols = min(
        mine.shape[1], theirs.shape[1]
    )  # the kernels pad to 16 at least, the reference to blocks
    if mine[:, cols:].any() or theirs[:, cols:].any() or mine.shape[0] != theirs.shape[0]:
        return [f"{name}: {list(mine.shape)}, not {list(theirs.shape)}"]
    wrong = int((mine[:, :cols] != theirs[:, :cols]).sum())
    # The reference adds noise in fp32, which can round up to the next digit below 2^-25 of it
    if wrong > 1e-6 * theirs.numel():
        return [f"{name}: {wrong} of {theirs.numel()} values differ"]
    return []


def alphas_differ(name: str, a: TritonOperand, b: TritonOperand) -> list[str]:
    """The product of both alphas is made while casting where both casts have one of their own."""
    a, b = a.expanded(), b.expanded()
    found = product(a, b)
    own = [v for v in (a.alpha, b.alpha) if v is not None]
    if len(own) < 2:
        return [] if found is (own[0] if own else None) else [f"{name}: another alpha"]
    bad = [] if torch.equal(found, own[0] * own[1]) else [f"{name}: {found} of {own}"]
    made = any(v.paired is not None and v.paired[1] is found for v in (a, b))
    return bad if made or a.factors is not None else [*bad, f"{name}: multiplied once more"]


def _products_differ(
    name: str,
    backend: TritonBackend,
    a: TritonOperand,
    b: TritonOperand,
    *,
    fast: bool,
    accumulate: bool,
) -> list[str]:
    av, bv = plain_values(a).double(), plain_values(b).double()
    alpha = 1.0
    for operand in (a, b):
        alpha *= 1.0 if operand.alpha is None else operand.alpha.item()
    want = av @ bv.t() * alpha
    k = a.shape[1]
    fp8 = a.expanded().data.dtype != torch.bfloat16
    share = (k if fast else min(k, 128)) / 32 * 2.0**-12 if fp8 else k * 2.0**-24
    limit = av.abs() @ bv.abs().t() * abs(alpha) * share
    start = torch.ones(want.shape, device=want.device)
    if accumulate:
        got = backend.gemm(
            a, b, out_dtype=torch.float32, accumulate_into=start.clone(), fast_accum=fast
        )
        wrong = (got.double() - want - start).abs() > limit + 2.0**-23 * (want.abs() + 1)
    else:
        got = backend.gemm(a, b, out_dtype=torch.bfloat16, fast_accum=fast)
        wrong = (got.double() - want).abs() > limit + 2.0**-8 * want.abs()
    return (
        [f"{name}: {int(wrong.sum())} of {wrong.numel()} products are off"] if wrong.any() else []
    )
