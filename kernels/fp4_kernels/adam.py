"""AdamW on many tensors in one launch, which writes the model's BF16 weights too: 30 bytes an element.

    gradient, master, moments  ->  master, moments [, the weight in BF16]

PyTorch's fused AdamW writes the scaled gradient back, and another pass copies masters to weights: 38 bytes.
(Adam: Kingma and Ba, 2015; decoupled weight decay: Loshchilov and Hutter, 2019.) The gradient is divided by
a scale, which clips it, and a flag on the device has everything left as it is, so that a captured update
can be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # elements of a program
_FIELDS = 6  # of a row of ``Tensors.table``: five addresses and the number of elements


class Slot(NamedTuple):
    """One tensor to update, fp32 and contiguous each; ``weight``: bfloat16, or None where the master is the
    weight."""

    master: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    weight: Tensor | None


class Tensors(NamedTuple):
    """Slots as the kernel finds them: addresses and sizes, and for each program its slot and block."""

    table: Tensor  # int64 [slots, 6]
    programs: Tensor  # int32 [programs, 2]
    aligned: bool  # addresses to 16 bytes, sizes to 16 elements


class Constants(NamedTuple):
    """Of every slot: Adam's two decays and what is added to a denominator."""

    beta1: float
    beta2: float
    eps: float


@triton.jit
def _vector(address, place, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the elements at ``place`` of a tensor at an address."""
    if BF16:
        ptr = address.to(tl.pointer_type(tl.bfloat16)) + place
    else:
        ptr = address.to(tl.pointer_type(tl.float32)) + place
    if ALIGNED:
        ptr = tl.max_contiguous(tl.multiple_of(ptr, 16), place.shape[0])
    return ptr


@triton.jit
def adam_kernel(
    table_ptr, programs_ptr, rates_ptr, scale_ptr, blocked_ptr,
    beta1, rest1, beta2, rest2, eps,
    FIELDS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one slot. rates [slots, 3]: the step's length, 1 / sqrt of the second moment's correction,
    and what weight decay leaves of a weight. rest: 1 - beta."""
    if tl.load(blocked_ptr) == 0.0:
        slot = tl.load(programs_ptr + 2 * tl.program_id(0)).to(tl.int64)
        block = tl.load(programs_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
        row = table_ptr + slot * FIELDS
        size = tl.load(row + 5)
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        length = tl.load(rates_ptr + slot * 3)
        root = tl.load(rates_ptr + slot * 3 + 1)
        left = tl.load(rates_ptr + slot * 3 + 2)
        scale = 1.0 / tl.load(scale_ptr)
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        master_ptr = _vector(tl.load(row), place, False, ALIGNED)
        first_ptr = _vector(tl.load(row + 2), place, False, ALIGNED)
        second_ptr = _vector(tl.load(row + 3), place, False, ALIGNED)
        weight = tl.load(row + 4)
        gradient_ptr = _vector(tl.load(row + 1), place, False, ALIGNED)
        g = tl.load(gradient_ptr, mask=inside, other=0.0) * scale
        m = tl.load(first_ptr, mask=inside, other=0.0)
        v = tl.load(second_ptr, mask=inside, other=0.0)
        w = tl.load(master_ptr, mask=inside, other=0.0)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * (g * g)
        w = w * left - length * (m / (tl.sqrt(v) * root + eps))
        tl.store(first_ptr, m, mask=inside)
        tl.store(second_ptr, v, mask=inside)
        tl.store(master_ptr, w, mask=inside)
        if weight != 0:
            tl.store(_vector(weight, place, True, ALIGNED), w.to(tl.bfloat16), mask=inside)


def tensors_of(slots: Sequence[Slot]) -> Tensors:
    """What ``adam`` is given; copied to the slots' device, so not while a graph is captured."""
    rows, programs = [], []
    for number, slot in enumerate(slots):
        held = [t for t in slot if t is not None]
        size = slot.master.numel()
        if not all(t.is_contiguous() and t.numel() == size for t in held):
            raise ValueError(
                f"the tensors of slot {number} have other sizes than its master's {size}"
            )
        rows.append([0 if t is None else t.data_ptr() for t in slot] + [size])
        programs += [(number, block) for block in range(triton.cdiv(size, BLOCK))]
    device = slots[0].master.device
    table = torch.tensor(rows, dtype=torch.int64)
    return Tensors(
        table.to(device),
        torch.tensor(programs, dtype=torch.int32).to(device),
        not bool((table % 16).any()),
    )


def adam(
    tensors: Tensors,
    rates: Tensor,
    constants: Constants,
    *,
    scale: Tensor,
    blocked: Tensor,
) -> None:
    """Update every slot in place.

    Args:
        rates: fp32 [slots, 3]: learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - learning rate *
            weight decay, of step t.
        scale: fp32 scalar on the device that gradients are divided by.
        blocked: fp32 scalar on the device; other than 0: nothing is written.
    """
    beta1, beta2, eps = constants
    if len(tensors.programs):
        adam_kernel[(len(tensors.programs),)](
            tensors.table, tensors.programs, rates, scale, blocked,
            beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps,
            _FIELDS, tensors.aligned, BLOCK, num_warps=WARPS,
        )  # fmt: skip
