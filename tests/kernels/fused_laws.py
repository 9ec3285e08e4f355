"""Norm, SwiGLU, rotary split and cross entropy against float64: every check returns what is wrong.

An FP32 kernel is off by its own rounding alone: sums of n terms by n * 2^-24 of their magnitudes, an
elementwise result by a few ulps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from fp4_kernels.cross_entropy import token_gradients, token_statistics
from fp4_kernels.norm import norm, norm_backward
from fp4_kernels.rope import split_rotated, split_rotated_backward
from fp4_kernels.swiglu import swiglu, swiglu_backward
from torch import Tensor

FUSED_CASES = (
    "norm layer 37x96",
    "norm rms 37x96",
    "norm rms 5x4999",
    "swiglu 13x1030",
    "rope whole",
    "rope positions",
    "cross_entropy whole",
    "cross_entropy parts",
)


def far(name: str, got: Tensor, want: Tensor, *, limit: float = 2e-5) -> list[str]:
    """Where ||got - want|| / ||want|| is above the limit, or not a number."""
    error = float((got.double().cpu() - want.detach().cpu()).norm() / want.detach().norm().cpu())
    return [] if error <= limit else [f"{name}: {error:.1e} from float64"]


def check_norm(kind: str, shape: str, *, device: str = "cpu") -> list[str]:
    rows, n = map(int, shape.split("x"))
    g = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n, generator=g) * 2 + 0.5
    weight, bias = torch.randn(n, generator=g), torch.randn(n, generator=g)
    dy = torch.randn(rows, n, generator=g)
    x64, w64, b64 = (t.double().requires_grad_() for t in (x, weight, bias))
    centered = kind == "layer"
    want = F.layer_norm(x64, (n,), w64, b64, 1e-5) if centered else F.rms_norm(x64, (n,), w64, 1e-5)
    want.backward(dy.double())
    x, weight, bias, dy = (t.to(device) for t in (x, weight, bias, dy))
    got = norm(x, weight, bias if centered else None, eps=1e-5, centered=centered)
    dx, dw, db = norm_backward(x, weight, dy, eps=1e-5, centered=centered, has_bias=centered)
    bad = far("y", got, want) + far("dx", dx, _grad(x64)) + far("dw", dw, _grad(w64))
    return bad + (far("db", db, _grad(b64)) if db is not None else [])


def check_swiglu(shape: str, *, device: str = "cpu") -> list[str]:
    rows, n = map(int, shape.split("x"))
    g = torch.Generator().manual_seed(n)
    x, dy = torch.randn(rows, 2 * n, generator=g), torch.randn(rows, n, generator=g)
    x64 = x.double().requires_grad_()
    want = F.silu(x64[:, :n]) * x64[:, n:]
    want.backward(dy.double())
    x, dy = x.to(device), dy.to(device)
    return far("y", swiglu(x), want) + far("dx", swiglu_backward(x, dy), _grad(x64))


def check_rope(kind: str, *, device: str = "cpu") -> list[str]:
    """Heads that share keys, a head size that is no power of two, gradients in another layout."""
    s, b, groups, heads, d = 9, 2, 3, 2, 24
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(s, b, groups, heads + 2, d, generator=g)
    half = torch.randn(s, b if kind == "positions" else 1, d // 2, generator=g) * 50
    angles = torch.cat([half, half], dim=-1)
    x64 = qkv.double().requires_grad_()

    def turned(t: Tensor) -> Tensor:
        a = angles.double()[:, :, None]
        other = torch.cat((-t[..., d // 2 :], t[..., : d // 2]), dim=-1)
        return t * a.cos() + other * a.sin()

    q = turned(x64[..., :heads, :].reshape(s, b, groups * heads, d))
    want = q, turned(x64[..., heads, :]), x64[..., heads + 1, :]
    gradients = [torch.randn(*w.shape, generator=g) for w in want]
    products = [(w * dw.double()).sum() for w, dw in zip(want, gradients, strict=True)]
    torch.stack(products).sum().backward()
    got = split_rotated(qkv.to(device), angles.to(device))
    bad = []
    for name, have, expected in zip("qkv", got, want, strict=True):
        bad += far(name, have, expected)
    # as attention returns them: heads outside of positions
    dq, dk, dv = (
        t.to(device).permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in gradients
    )
    return bad + far("dqkv", split_rotated_backward(dq, dk, dv, angles.to(device)), _grad(x64))


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


def check_fused(case: str, *, device: str = "cpu") -> list[str]:
    """One of FUSED_CASES."""
    name, *words = case.split()
    checks: dict[str, Any] = {
        "norm": check_norm,
        "swiglu": check_swiglu,
        "rope": check_rope,
        "cross_entropy": check_cross_entropy,
    }
    return checks[name](*words, device=device)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
