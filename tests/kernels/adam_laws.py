"""Our Adam against float64: every check returns what is wrong."""

from __future__ import annotations

import torch
from fp4_kernels.adam import Constants, Slot, adam, tensors_of
from fused_laws import far

ADAM_CASES = ("aligned", "shards")


def check_adam(kind: str, *, device: str = "cpu") -> list[str]:
    """A step of several tensors at once, whole ones and (``shards``) parts that begin anywhere; then one that
    is held back."""
    begin, sizes = (0, (48, 5008, 4096)) if kind == "aligned" else (3, (7, 5000, 4097))
    g = torch.Generator().manual_seed(3)
    slots, truth = [], []
    for number, size in enumerate(sizes):
        w, dw, m, v = torch.randn(4, begin + size, generator=g)
        v = v.square()
        held = [t.to(device, copy=True)[begin:] for t in (w, dw, m, v)]
        weight = None if number == 1 else torch.zeros(size, dtype=torch.bfloat16, device=device)
        slots.append(Slot(*held, weight))
        truth.append([t[begin:].double() for t in (w, dw, m, v)])
    tensors = tensors_of(slots)
    bad = [] if tensors.aligned == (kind == "aligned") else ["another kernel"]
    rate, decay, steps = 1e-2, 0.1, 3
    lengths = [rate / (1 - 0.9**steps), (1 - 0.95**steps) ** -0.5, 1 - rate * decay]
    rates, scale = torch.tensor([lengths] * 3, device=device), torch.tensor(2.0, device=device)
    for blocked in (0.0, 1.0):  # what is held back changes nothing more
        flag = torch.tensor(blocked, device=device)
        adam(tensors, rates, Constants(0.9, 0.95, 1e-8), scale=scale, blocked=flag)
    for slot, (w, dw, m, v) in zip(slots, truth, strict=True):
        m, v = 0.9 * m + 0.1 * dw / 2, 0.95 * v + 0.05 * (dw / 2) ** 2
        w = w * lengths[2] - lengths[0] * m / ((v).sqrt() * lengths[1] + 1e-8)
        bad += far("master", slot.master, w, limit=1e-6)
        bad += far("first", slot.first, m, limit=1e-6) + far("second", slot.second, v, limit=1e-6)
        if slot.weight is not None:  # the interpreter cuts bfloat16 off
            bad += far("weight", slot.weight, w, limit=2.0**-7 if device == "cpu" else 2.0**-8)
    return bad
