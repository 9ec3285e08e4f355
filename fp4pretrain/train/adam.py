"""Whose Adam updates the masters: megatron-core takes Transformer Engine's fused one where that package is,
else apex's, else torch's, whose steps our kernel then makes on a GPU (`fused_adam`, ``train.fusion``). On a
CPU it is torch's, since the others are CUDA kernels (``parallel.bridge``).
"""

from __future__ import annotations

from typing import Any

import torch

from fp4pretrain.nvidia import why_no_apex, why_no_engine
from fp4pretrain.ops.choice import without_triton
from fp4pretrain.train.fused_adam import FusedAdam

_WHOSE = {"transformer_engine": "Transformer Engine's", "apex": "apex's", "torch": "torch's"}


def adam_of(optimizer: Any) -> str:
    """The Adam of a built optimizer as one phrase, such as ``apex's FusedAdam``; all of them where its
    parts differ."""
    return ", ".join(sorted({_whose(part.optimizer) for part in optimizer.chained_optimizers}))


def adam_here(device: torch.device) -> str:
    """The Adam that a run on the device takes, and why it takes none of the others."""
    if device.type != "cuda":
        return "torch's AdamW (fused ones of Transformer Engine and apex are CUDA kernels)"
    from megatron.core import optimizer

    passed = "; ".join(f"no {name}" for name in (why_no_engine(), why_no_apex()) if name)
    if optimizer.USING_PYTORCH_OPTIMIZER:
        ours = "" if without_triton() else ", by our kernel unless train.fusion=never"
        return f"torch's AdamW{ours} ({passed})"
    return _named(optimizer.Adam)


def _whose(inner: Any) -> str:
    named = _named(type(inner))
    return (
        f"{named}, by our kernel" if isinstance(getattr(inner, "step", None), FusedAdam) else named
    )


def _named(kind: type) -> str:
    owner = kind.__module__.partition(".")[0]
    return f"{_WHOSE.get(owner, owner)} {kind.__name__}"
