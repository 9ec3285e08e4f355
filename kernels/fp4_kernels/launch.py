"""Launching a Triton kernel again without asking again what it was compiled for.

Triton's launcher inspects every argument of every call, which takes longer than many of these kernels run.
What a launch was compiled for is known here: types, alignment of pointers, the integers it specializes on
and the compile-time constants. Under that key the compiled kernel is kept and called directly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_COMPILED: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    arguments: tuple,
    scalars: tuple[int, ...],
    constants: tuple,
    *,
    warps: int,
) -> None:
    """Run ``kernel`` on ``grid``.

    Args:
        arguments: tensors, None, and integers that Triton specializes on; the first is a tensor.
        scalars: integers that it does not.
        constants: the kernel's compile-time arguments; all three in the kernel's order.
        warps: warps of a program.
    """
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter, which has nothing to keep
        kernel[grid](*arguments, *scalars, *constants, num_warps=warps, enable_fp_fusion=False)
        return
    # by identity: a kernel's own hash is that of its source
    key = (id(kernel), device.index, warps, constants, *map(_specialization, arguments))
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](
            *arguments, *scalars, *constants, num_warps=warps, enable_fp_fusion=False
        )
        return
    compiled[(*grid, 1)](*arguments, *scalars, *constants)


def _specialization(argument: Tensor | int | None) -> Any:
    """What a kernel is compiled for: an element type and whether 16 bytes divide the address, or a value."""
    if argument is None or argument.__class__ is int:
        return argument
    return argument.dtype, argument.data_ptr() % 16 == 0
