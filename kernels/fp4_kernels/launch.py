"""Launching a Triton kernel again without asking again what it was compiled for.

Triton's launcher inspects every argument of every call, which takes longer than many of these kernels run.
What a launch was compiled for is known here: types, alignment of pointers, the integers it specializes on
and the compile-time constants. Under that key the compiled kernel is kept and called directly, with bare
addresses: for a tensor Triton would ask the driver whose memory it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COMPILED: dict[tuple, Any] = {}

# A tensor, one read as another type of the same memory, an integer, or nothing.
Argument = Tensor | tuple[Tensor, torch.dtype] | int | None


def launch(
    kernel: Any,
    grid: tuple[int, int],
    arguments: tuple[Argument, ...],
    scalars: tuple[int, ...],
    constants: tuple,
    *,
    warps: int,
    stages: int = 3,
    fusion: bool = False,
) -> None:
    """Run ``kernel`` on ``grid``.

    Args:
        arguments: tensors, (tensor, the dtype it is read as), None, and integers that Triton
            specializes on; the first is a tensor.
        scalars: integers that it does not.
        constants: the kernel's compile-time arguments; all three in the kernel's order.
        warps: warps of a program; stages: of its software pipeline.
        fusion: let products be added before they are rounded (casts must not: see ``arith``).
    """
    first: Any = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    if not first.is_cuda:  # Triton's interpreter, which has nothing to keep
        kernel[grid](*map(_tensor, arguments), *scalars, *constants)
        return
    # by identity: a kernel's own hash is that of its source
    key: list[Any] = [id(kernel), first.get_device(), warps, constants]
    passed: list[int | None] = []
    for argument in arguments:
        if argument is None or argument.__class__ is int:
            key.append(argument)
            passed.append(argument)
            continue
        tensor, dtype = argument if argument.__class__ is tuple else (argument, argument.dtype)
        address = tensor.data_ptr()
        key.append((dtype, address % 16 == 0))
        passed.append(address)
    found = _COMPILED.get(tuple(key))
    if found is None:
        _COMPILED[tuple(key)] = kernel[grid](
            *map(_tensor, arguments), *scalars, *constants,
            num_warps=warps, num_stages=stages, enable_fp_fusion=fusion,
        )  # fmt: skip
        return
    found[(*grid, 1)](*passed, *scalars, *constants)


def _tensor(argument: Argument) -> Tensor | int | None:
    """An argument of ``launch`` as Triton takes it: a tensor under the dtype it is read as, or the
    integer or None."""
    return argument[0].view(argument[1]) if isinstance(argument, tuple) else argument
