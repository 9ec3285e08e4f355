"""The autograd functions that take a linear's bias, against float64: every check returns what is wrong.

A bias has no main gradient ("plain": autograd is given its gradient), an FP32 one ("main": the gradient is
added there), or is frozen. "total": of a norm's two outputs nobody reads the norm. "through": a norm is given
nothing to add, and hands its input on.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from fused_laws import far
from torch import Tensor

FUNCTION_CASES = (
    *(
        f"function {n} {s}"
        for n, s in product(("norm", "gelu", "split", "rope"), ("plain", "main"))
    ),
    *(f"function {n} frozen" for n in ("norm", "gelu", "split", "rope")),
    "function norm total",
    "function through plain",
    "function through total",
)
SHAPE = 5, 2, 2, 3, 8  # s, b, groups, heads + 2, d
WIDTH = 48


def _check_through(state: str, device: str) -> list[str]:
    """x itself is handed on, as no view of it (megatron-core wants none between layers)."""
    from fp4pretrain.nn import fused

    g = torch.Generator().manual_seed(4)
    x, *gradients = (torch.randn(5, 2, WIDTH, generator=g).to(device) for _ in range(3))
    weight = torch.nn.Parameter(torch.rand(WIDTH, generator=g).to(device))
    read = slice(1, None) if state == "total" else slice(None)
    x64 = x.double().requires_grad_()
    want = F.rms_norm(x64, (WIDTH,), weight.double(), 1e-5), x64 * 1
    torch.autograd.backward(want[read], [dy.double() for dy in gradients[read]])
    how = fused.NormPass(1e-5, False, None, None)
    got = fused.FusedNormFunction.apply(x.requires_grad_(), None, weight, None, None, how)
    torch.autograd.backward(got[read], gradients[read])
    assert x.grad is not None and x64.grad is not None
    bad = far("dx", x.grad, x64.grad) + far("y", got[0].detach(), want[0])
    handed_on = got[1].data_ptr() == x.data_ptr() and got[1]._base is None
    return bad + ([] if handed_on else ["the input is not handed on"])


def _ours(name: str, x: Tensor, bias: Tensor, state: str) -> tuple[Tensor, ...]:
    from fp4pretrain.nn import fused

    if name == "norm":
        weight: Any = torch.nn.Parameter(torch.ones(WIDTH, device=x.device))
        if state == "main":
            weight.main_grad = torch.zeros(WIDTH, device=x.device)
        how = fused.NormPass(1e-5, True, None, None)
        norm_bias: Any = torch.nn.Parameter(torch.zeros_like(weight))
        if state == "main":
            norm_bias.main_grad = torch.zeros(WIDTH, device=x.device)
        found = fused.FusedNormFunction.apply(x, x.detach() * 2, weight, norm_bias, bias, how)
        return found[1:] if state == "total" else found
    if name == "gelu":
        return (fused.ActivationFunction.apply(x, bias, "gelu", (None, None)),)
    qkv = (x * 1).view(SHAPE)  # a product, to which the bias may be added in place
    if name == "split":
        return fused.SplitFunction.apply(qkv, bias, None)
    return fused.SplitRotatedFunction.apply(qkv, bias, torch.zeros(SHAPE[0], 1, 8, device=x.device))


def _truth(name: str, t: Tensor, x: Tensor, state: str) -> tuple[Tensor, ...]:
    """Of t = x + bias. Angles of zero turn nothing."""
    if name == "norm":
        total = t + x.detach() * 2
        return (total,) if state == "total" else (F.layer_norm(total, (WIDTH,)), total)
    if name == "gelu":
        return (F.gelu(t),)
    qkv = t.view(SHAPE)
    return qkv[..., :1, :].flatten(2, 3), qkv[..., 1, :], qkv[..., 2, :]


def check_function(name: str, state: str, *, device: str = "cpu") -> list[str]:
    """One of FUNCTION_CASES."""
    if name == "through":
        return _check_through(state, device)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(*SHAPE[:2], WIDTH, generator=g).to(device).requires_grad_()
    bias: Any = torch.nn.Parameter(torch.randn(WIDTH, generator=g).to(device))
    x64, b64 = (t.detach().double().requires_grad_() for t in (x, bias))
    bias.requires_grad_(state != "frozen")
    if state == "main":
        bias.main_grad = torch.ones(WIDTH, device=device)
    got, want = _ours(name, x, bias, state), _truth(name, x64 + b64, x64, state)
    gradients = [torch.randn(*w.shape, generator=g).to(device) for w in want]
    torch.autograd.backward(got, gradients)
    torch.autograd.backward(want, [dy.double() for dy in gradients])
    assert x.grad is not None and x64.grad is not None and b64.grad is not None
    bad = far("dx", x.grad, x64.grad)
    for i, (mine, truth) in enumerate(zip(got, want, strict=True)):
        bad += far(f"output {i}", mine.detach(), truth)
    if state == "frozen":
        return bad + ([] if bias.grad is None else ["a frozen bias has a gradient"])
    if state == "main":
        told = (
            [] if bias.grad_added_to_main_grad else ["nobody is told that the gradient was added"]
        )
        return bad + told + far("main gradient", bias.main_grad, b64.grad + 1)
    return bad + far("bias's gradient", bias.grad, b64.grad)
