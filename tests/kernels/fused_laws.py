"""Norm, activations, splits and cross entropy against float64, the amaxes that they leave against `amax`:
every check returns what is wrong.

An FP32 kernel is off by its own rounding alone: sums of n terms by n * 2^-24 of their magnitudes, an
elementwise result by a few ulps.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from fp4_kernels.activation import KINDS, activation, activation_backward
from fp4_kernels.amax import amax
from fp4_kernels.bias import add_bias
from fp4_kernels.cross_entropy import token_gradients, token_rescale, token_statistics
from fp4_kernels.embedding import embedding_backward
from fp4_kernels.join import join
from fp4_kernels.norm import KEEP, NormCall, NormGradients, norm, norm_backward
from fp4_kernels.rope import split_rotated, split_rotated_backward
from fp4_kernels.spec import NO_TURN, ColumnSums, Leave, Turn
from torch import Tensor

FUSED_CASES = (
    "norm layer 170x96",
    "norm rms 170x96",
    "norm rms 5x4999",
    "norm layer 37x96 sum",
    "norm rms 37x96 sum",
    "norm layer 7x1024 sum bias",
    "norm layer 37x96 sum bias",
    "norm rms 37x96 sum bias",
    "norm layer 176x96 sum bias turned",
    "norm rms 32x1024 turned",
    "norm_rounds",
    "norm_refuses",
    "activation gelu",
    "activation squared_relu",
    "activation swiglu",
    "activation gelu bias",
    "activation squared_relu bias",
    "activation swiglu bias",
    "activation_rounds",
    "join 1x24",
    "join 3x136",
    "embedding",
    "left norm layer 40",
    "left norm rms 64",
    "left gelu",
    "left swiglu",
    "left join",
    "rope whole",
    "rope positions",
    "rope positions bias",
    "rope alone",
    "rope alone bias",
    "rope shared bias",
    "split_rounds",
    "cross_entropy whole",
    "cross_entropy parts",
    "cross_entropy_known",
)


def far(name: str, got: Tensor, want: Tensor, *, limit: float = 2e-5) -> list[str]:
    """Where ||got - want|| / ||want|| is above the limit, or not a number."""
    error = float((got.double().cpu() - want.detach().cpu()).norm() / want.detach().norm().cpu())
    return [] if error <= limit else [f"{name}: {error:.1e} from float64"]


def check_norm(kind: str, shape: str, *words: str, device: str = "cpu") -> list[str]:
    """Of x, or of the sum of x, a linear's bias and a residual, whose gradient comes from another reader too;
    gradients of vectors written the first time and added the second. "turned": by the kernel that leaves a
    rotated amax, and the one that leaves a plain one."""
    summed, biased = "sum" in words, "bias" in words
    left = torch.zeros(2, dtype=torch.int32, device=device)
    turned = "turned" in words
    leave = Leave(True, Turn(16, None), left) if turned else None
    rows, n = map(int, shape.split("x"))
    g = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n, generator=g) * 2 + 0.5
    residual = torch.randn(rows, n, generator=g) if summed else torch.zeros(rows, n)
    weight, bias = torch.randn(n, generator=g), torch.randn(n, generator=g)
    linear_bias = torch.randn(n, generator=g) if biased else torch.zeros(n)
    dy, dtotal = torch.randn(rows, n, generator=g), torch.randn(rows, n, generator=g)
    x64, w64, b64, l64 = (t.double().requires_grad_() for t in (x, weight, bias, linear_bias))
    centered = kind == "layer"
    t64 = x64 + l64 + residual
    want = F.layer_norm(t64, (n,), w64, b64, 1e-5) if centered else F.rms_norm(t64, (n,), w64, 1e-5)
    ((want * dy).sum() + ((t64 * dtotal).sum() if summed else 0)).backward()
    x, residual, weight, bias, linear_bias, dy, dtotal = (
        t.to(device) for t in (x, residual, weight, bias, linear_bias, dy, dtotal)
    )
    call = NormCall(
        1e-5, centered, residual if summed else None, leave, linear_bias if biased else None
    )
    got, total, statistics = norm(x, weight, bias if centered else None, call)
    bad = far("total", total, t64) if total is not None else []
    seen = x if total is None else total
    leave = Leave(True, None, left) if turned else None
    call = NormCall(1e-5, centered, dtotal if summed else None, leave)
    for times in (1, 2):
        if times == 1:
            dw, db, dl = torch.full((3, n), torch.nan, device=device)
        found = NormGradients(dw, db if centered else None, dl if biased else None, add=times == 2)
        dx = norm_backward(seen, statistics, weight, dy, found, call)
        bad += far(f"dw {times}", dw, _grad(w64) * times)
        bad += far(f"db {times}", db, _grad(b64) * times) if centered else []
        bad += far(f"dlinear {times}", dl, _grad(l64) * times) if biased else []
    return bad + far("y", got, want) + far("dx", dx, _grad(x64))


def check_norm_rounds(*, device: str = "cpu") -> list[str]:
    """In float16 (the interpreter cuts bfloat16 off): a linear's bias in the kernel gives the bits of a sum
    beforehand, which are PyTorch's, and the bias's gradient is the sum of what was written."""
    g = torch.Generator().manual_seed(3)
    x, residual, dy = (torch.randn(21, 40, generator=g).half().to(device) for _ in range(3))
    weight, bias, added = torch.randn(3, 40, generator=g).half().to(device)
    inside = norm(x, weight, bias, NormCall(1e-5, True, residual, None, added))
    before = norm(x + added, weight, bias, NormCall(1e-5, True, residual))
    found = NormGradients(*torch.zeros(3, 40, device=device), add=False)
    assert found.linear_bias is not None and inside.total is not None
    dx = norm_backward(inside.total, inside.statistics, weight, dy, found, NormCall(1e-5, True))
    bad = far("dlinear", found.linear_bias, dx.double().sum(0))
    assert before.total is not None
    pairs = [("y", inside.out, before.out), ("total", inside.total, before.total)]
    pairs.append(("total by PyTorch", inside.total, residual + (x + added)))
    return bad + [f"{name}: other bits" for name, a, b in pairs if not torch.equal(a, b)]


def check_norm_refuses(*, device: str = "cpu") -> list[str]:
    """An amax rotated over sixteen tokens: of rows that they do not divide, of rows that are too wide to be
    kept, and in the backward pass."""
    leave = Leave(True, Turn(16, None), torch.zeros(2, dtype=torch.int32, device=device))
    asked = NormCall(1e-5, False, leave=leave)
    x, weight = torch.ones(48, 32, device=device), torch.ones(32, device=device)
    wide = torch.ones(16, KEEP + 1, device=device)
    found = NormGradients(torch.zeros(32, device=device), None, None, add=False)
    statistics = norm(x, weight, None, NormCall(1e-5, False)).statistics
    calls = {
        "40 rows": lambda: norm(x[:40], weight, None, asked),
        "wide rows": lambda: norm(wide, wide[0], None, asked),
        "backward": lambda: norm_backward(x, statistics, weight, x, found, asked),
    }
    bad = []
    for name, call in calls.items():
        try:
            call()
        except ValueError:
            continue
        bad.append(f"{name}: something is left")
    return bad


_ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "squared_relu": lambda x: F.relu(x).square(),
    "swiglu": lambda x: F.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :],
}


def check_activation(kind: str, biased: str = "", *, device: str = "cpu") -> list[str]:
    """By the kernels that leave nothing, an amax, and a rotated one too, each with an edge. The first write
    a bias's gradient, the others add it."""
    bad = []
    turned = Turn(16, None)
    for n, left, turn in ((1030, False, None), (70, True, None), (1030, True, turned)):
        g = torch.Generator().manual_seed(n)
        width = 2 * n if kind == "swiglu" else n
        x, bias = torch.randn(37, width, generator=g) * 2, torch.randn(width, generator=g)
        dy = torch.randn(37, n, generator=g)
        x64, b64 = x.double().requires_grad_(), bias.double().requires_grad_()
        want = _ACTIVATIONS[kind](x64 + b64 if biased else x64)
        want.backward(dy.double())
        x, bias, dy = x.to(device), bias.to(device), dy.to(device)
        out = torch.zeros(2, dtype=torch.int32, device=device)
        leave = Leave(True, turn, out) if left else None
        y = activation(x, kind, bias=bias if biased else None, leave=leave)
        sums = ColumnSums(torch.full((width,), 1.0 if left else torch.nan, device=device), left)
        dx = activation_backward(x, dy, kind, bias=(bias, sums) if biased else None, leave=leave)
        bad += far(f"y, {left, turn}", y, want) + far(f"dx, {left, turn}", dx, _grad(x64))
        bad += far(f"db, {left, turn}", sums.out, _grad(b64) + left) if biased else []
    return bad


def check_activation_rounds(*, device: str = "cpu") -> list[str]:
    """In float16: a bias in the kernels gives the bits of a sum beforehand; its gradient is the sum of what
    was written, and where nobody asks for it the rest is the same."""
    g = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(20, 40, generator=g).half().to(device) for _ in range(2))
    bias = torch.randn(40, generator=g).half().to(device)
    zero, bad = torch.zeros_like(bias), []
    for kind in KINDS:
        grown = dy[:, :20].contiguous() if kind == "swiglu" else dy
        sums = ColumnSums(torch.empty(40, device=device), False)
        inside = [
            activation(x, kind, bias=bias),
            activation_backward(x, grown, kind, bias=(bias, sums)),
            activation_backward(x, grown, kind, bias=(bias, None)),
        ]
        before = [
            activation(x + bias, kind, bias=zero),
            *[activation_backward(x + bias, grown, kind, bias=(zero, None))] * 2,
        ]
        pairs = zip(("y", "dx", "dx alone"), inside, before, strict=True)
        bad += [f"{kind}, {name}: other bits" for name, a, b in pairs if not torch.equal(a, b)]
        bad += far(f"{kind}, db", sums.out, inside[1].double().sum(0))
    return bad


def check_embedding(*, device: str = "cpu") -> list[str]:
    """A token in many places, one in a single one and one in none; what stood in the gradient stays."""
    tokens, words, n = 53, 7, 600
    g = torch.Generator().manual_seed(1)
    read = torch.randint(0, 5, (tokens,), generator=g)
    read[read == 3] = 2
    read[17] = 6
    dy, main = torch.randn(tokens, n, generator=g), torch.randn(words, n, generator=g)
    want = main.double().index_add(0, read, dy.double())
    got = main.to(device)
    embedding_backward(read.to(device), dy.to(device), got)
    untouched = torch.equal(got[[3, 5]].cpu(), main[[3, 5]])
    return far("gradient", got, want) + ([] if untouched else ["an unread row has changed"])


def check_join(shape: str, *, device: str = "cpu") -> list[str]:
    """Gradients as attention returns them, heads outside of positions; no element is another's; a
    bias's gradient is added to what is there."""
    heads, d = map(int, shape.split("x"))
    parts = _parts(heads, d, torch.float32, device)
    s, b, groups, _ = parts[1].shape
    want = torch.cat([p.reshape(s, b, groups, -1, d) for p in parts], dim=3)
    found = torch.ones(want[0, 0].numel(), device=device)
    joined = join(*parts, sums=ColumnSums(found, True))
    bad = far("sums", found, want.double().sum((0, 1)).view(-1) + 1)
    return bad if torch.equal(joined, want) else [*bad, "the parts are mixed up"]


def _parts(heads: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    s, b, groups = 10, 8, 2
    g = torch.Generator().manual_seed(d)
    made = [torch.randn(b, h * groups, s, d, generator=g) for h in (heads, 1, 1)]
    q, k, v = (t.to(dtype).to(device).permute(2, 0, 1, 3) for t in made)
    return q, k, v


def check_left(kernel: str, *words: str, device: str = "cpu") -> list[str]:
    """The amaxes that a kernel leaves are, bit for bit, those that a pass over what it wrote finds: with
    edges that hang over tiles, a NaN, signs and none, a rotation that stays in FP32. ``words``: of a norm,
    whose backward pass leaves no rotated one."""
    bad = []
    cases = (
        (Turn(16, (1, -1, -1, 1) * 4), None),
        (Turn(16, None, True), torch.nan),
        (None, torch.inf),
    )
    for turn, special in cases:
        leaves = [Leave(True, turn, torch.zeros(2, dtype=torch.int32, device=device))] * 2
        leaves[1] = replace(leaves[0], out=leaves[0].out.clone())
        if kernel == "norm":
            written = _normed(special, leaves, device, *words)
        else:
            written = _written(kernel, special, leaves, device)
        for name, y, leave in written:
            want = amax(y, row=NO_TURN, col=leave.turn)[: 1 if leave.turn is None else 2]
            found = leave.amaxes[: len(want)]
            same = found.isnan().equal(want.isnan()) and found.nan_to_num().equal(want.nan_to_num())
            bad += [] if same else [f"{name}, {turn}, {special}: {found} is not {want}"]
    return bad


def _normed(
    special: float | None, leaves: list[Leave], device: str, kind: str, columns: str
) -> list[tuple[str, Tensor, Leave]]:
    """``_written`` by a norm, of more tiles than the interpreter has programs."""
    n, centered = int(columns), kind == "layer"
    g = torch.Generator().manual_seed(n)
    x, dy = (torch.randn(176, n, generator=g).bfloat16().to(device) for _ in range(2))
    weight = torch.randn(n, generator=g).bfloat16().to(device)
    if special is not None:
        x[17, 36] = dy[35, 3] = special
    y, total, statistics = norm(
        x, weight, weight if centered else None, NormCall(1e-5, centered, dy, leaves[0])
    )
    assert total is not None
    sums = torch.zeros(3, n, device=device)
    found = NormGradients(sums[0], sums[1] if centered else None, sums[2], add=False)
    plain = replace(leaves[1], turn=None)
    dx = norm_backward(total, statistics, weight, dy, found, NormCall(1e-5, centered, x, plain))
    return [("y", y, leaves[0]), ("dx", dx, plain)]


def _written(
    kernel: str, special: float | None, leaves: list[Leave], device: str
) -> list[tuple[str, Tensor, Leave]]:
    """(name, matrix that was written, what was left) of the kernel's two passes, in bfloat16."""
    g = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(48, 40, generator=g).bfloat16().to(device) for _ in range(2))
    if special is not None:
        x[17, 36] = dy[35, 3] = special
    if kernel == "join":
        parts = tuple(p[:4] for p in _parts(1, 24, torch.bfloat16, device))
        if special is not None:
            parts[0][3, 7, 1, 23] = special
        dqkv = join(*parts, leave=leaves[0])
        return [("dqkv", dqkv.view(32, -1), leaves[0])]
    dy = dy[:, :20].contiguous() if kernel == "swiglu" else dy
    y = activation(x, kernel, leave=leaves[0])
    dx = activation_backward(x, dy, kernel, leave=leaves[1])
    return [("y", y, leaves[0]), ("dx", dx, leaves[1])]


def check_rope(kind: str, biased: str = "", *, device: str = "cpu") -> list[str]:
    """Heads that share keys (``alone``: none do, ``shared``: all do, and qkv is turned in place), a head size
    that is no power of two, gradients in another layout."""
    s, b, d = 9, 2, 24
    groups, heads = {"alone": (3, 1), "shared": (1, 3)}.get(kind, (3, 2))
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(s, b, groups, heads + 2, d, generator=g)
    half = torch.randn(s, b if kind == "positions" else 1, d // 2, generator=g) * 50
    angles = torch.cat([half, half], dim=-1)
    bias = torch.randn(qkv[0, 0].numel(), generator=g) if biased else None
    b64 = torch.zeros(qkv[0, 0].numel()).double() if bias is None else bias.double()
    x64, b64 = qkv.double().requires_grad_(), b64.requires_grad_()

    def turned(t: Tensor) -> Tensor:
        a = angles.double()[:, :, None]
        other = torch.cat((-t[..., d // 2 :], t[..., : d // 2]), dim=-1)
        return t * a.cos() + other * a.sin()

    added = x64 + b64.view(groups, heads + 2, d)
    q = turned(added[..., :heads, :].reshape(s, b, groups * heads, d))
    want = q, turned(added[..., heads, :]), added[..., heads + 1, :]
    gradients = [torch.randn(*w.shape, generator=g) for w in want]
    products = [(w * dw.double()).sum() for w, dw in zip(want, gradients, strict=True)]
    torch.stack(products).sum().backward()
    bias = None if bias is None else bias.to(device)
    given = qkv.to(device, copy=True)
    got = split_rotated(given, angles.to(device), bias=bias)
    places = [t.untyped_storage().data_ptr() == given.untyped_storage().data_ptr() for t in got]
    bad = [] if places == [kind in ("alone", "shared")] * 3 else [f"views of qkv: {places}"]
    for name, have, expected in zip("qkv", got, want, strict=True):
        bad += far(name, have, expected)
    # as attention returns them: heads outside of positions
    dq, dk, dv = (
        t.to(device).permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in gradients
    )
    found = torch.ones(b64.numel(), device=device)
    sums = ColumnSums(found, True) if biased else None
    dqkv = split_rotated_backward(dq, dk, dv, angles.to(device), sums=sums)
    bad += far("db", found, _grad(b64) + 1) if biased else []
    return bad + far("dqkv", dqkv, _grad(x64))


def check_split_rounds(*, device: str = "cpu") -> list[str]:
    """In float16: a bias in the kernels gives the bits of a sum beforehand, alone (with edges) and before
    rotary embeddings."""
    g = torch.Generator().manual_seed(3)
    qkv = torch.randn(9, 1, 3, 4, 144, generator=g).half().to(device)
    bias = torch.randn(qkv[0, 0].numel(), generator=g).half().to(device)
    angles = torch.randn(9, 1, 72, generator=g).to(device)
    want = qkv + bias.view(3, 4, 144)
    inside, before = split_rotated(qkv, angles, bias=bias), split_rotated(want, angles)
    add_bias(qkv.view(9, -1), bias)
    named = [("sum", qkv, want), *zip("qkv", inside, before, strict=True)]
    return [f"{name}: other bits" for name, a, b in named if not torch.equal(a, b)]


def check_cross_entropy(kind: str, *, device: str = "cpu") -> list[str]:
    """Over a whole vocabulary, and over two parts combined as tensor-parallel ranks do."""
    tokens, words = 7, 5000
    g = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, words, generator=g) * 5
    labels = torch.randint(0, words, (tokens,), generator=g)
    upstream = torch.rand(tokens, generator=g)
    x64 = x.double().requires_grad_()
    want = F.cross_entropy(x64, labels, reduction="none")
    want.backward(upstream.double())
    x, labels, upstream = x.to(device), labels.to(device), upstream.to(device)
    cuts = (0, 1999, words) if kind == "parts" else (0, words)
    parts = [x[:, a:b].contiguous() for a, b in pairwise(cuts)]
    found = [token_statistics(p, labels, start=a) for p, a in zip(parts, cuts, strict=False)]
    peak = torch.stack([f[0] for f in found]).amax(dim=0)
    total = torch.stack([f[1] * torch.exp(f[0] - peak) for f in found]).sum(dim=0)
    log_total = torch.log(total) + peak
    bad = far("loss", log_total - sum(f[2] for f in found), want)
    made = [
        token_gradients(p, labels, log_total, upstream, start=a)
        for p, a in zip(parts, cuts, strict=False)
    ]
    overwritten = all(m.data_ptr() == p.data_ptr() for m, p in zip(made, parts, strict=True))
    bad += [] if overwritten else ["the gradient is a copy"]
    return bad + far("gradient", torch.cat(made, dim=1), _grad(x64))


def check_cross_entropy_known(*, device: str = "cpu") -> list[str]:
    """Gradients written beside the statistics: those of the upstream gradient that was known; of another one
    once that has come; untouched by one that rounding alone moved; NaN where none was known."""
    tokens, words = 37, 20000
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(tokens, words, generator=g) * 5
    labels = torch.randint(0, words, (tokens,), generator=g)
    known = torch.rand(tokens, generator=g) + 0.1
    known[3] = known[4] = 0.0
    come = known * (1 + 2**-22)
    come[4], come[20], come[36] = 1.0, known[20] * 3, 0.0
    x64 = logits.double().requires_grad_()
    want = F.cross_entropy(x64, labels, reduction="none")
    want.backward(known.double())
    x, labels, known, come = (t.to(device) for t in (logits.clone(), labels, known, come))
    beside = token_statistics(x, labels, upstream=known)
    alone = token_statistics(logits.to(device), labels)
    bad = far("loss", torch.log(beside[1]) + beside[0] - beside[2], want)
    bad += far("statistics", beside, alone.double()) + far("gradient", x, _grad(x64))
    before = x.clone()
    if token_rescale(x, known, come).data_ptr() != x.data_ptr():
        bad.append("the gradient is a copy")
    bad += far("tripled", x[20], before[20].double() * 3)
    bad += [] if not x[36].any() else ["a token that gets none has a gradient"]
    bad += [] if x[4].isnan().all() else ["a gradient that nobody knew of is no NaN"]
    kept = [i for i in range(tokens) if i not in (4, 20, 36)]
    return bad + ([] if torch.equal(x[kept], before[kept]) else ["a row was scaled for nothing"])


def check_fused(case: str, *, device: str = "cpu") -> list[str]:
    """One of FUSED_CASES."""
    name, *words = case.split()
    checks: dict[str, Any] = {
        "norm": check_norm,
        "norm_rounds": check_norm_rounds,
        "norm_refuses": check_norm_refuses,
        "activation": check_activation,
        "activation_rounds": check_activation_rounds,
        "embedding": check_embedding,
        "join": check_join,
        "left": check_left,
        "rope": check_rope,
        "split_rounds": check_split_rounds,
        "cross_entropy": check_cross_entropy,
        "cross_entropy_known": check_cross_entropy_known,
    }
    return checks[name](*words, device=device)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
