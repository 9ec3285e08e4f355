"""Whose Adam updates the masters: megatron-core takes Transformer Engine's fused one where that package is,
else apex's, else torch's. On a CPU it is torch's, since the others are CUDA kernels (``parallel.bridge``).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from fp4pretrain.errors import first_line

_WHOSE = {"transformer_engine": "Transformer Engine's", "apex": "apex's", "torch": "torch's"}


def adam_of(optimizer: Any) -> str:
    """Of a built optimizer: ``apex's FusedAdam``. One phrase, also where parts differ."""
    kinds = {type(part.optimizer) for part in optimizer.chained_optimizers}
    return ", ".join(sorted(_named(kind) for kind in kinds))


def adam_here(device: torch.device) -> str:
    """The one that a run on the device takes, and why none of the others."""
    if device.type != "cuda":
        return "torch's AdamW (fused ones of Transformer Engine and apex are CUDA kernels)"
    from megatron.core import optimizer

    passed = "; ".join(f"no {name}" for name in (why_no_engine(), why_no_apex()) if name)
    if optimizer.USING_PYTORCH_OPTIMIZER:
        return f"torch's AdamW ({passed})"
    return _named(optimizer.Adam)


def why_no_apex() -> str | None:
    """Why NVIDIA's apex is not here, as a clause after "no"; None where it is."""
    return _why_no("apex", "apex.optimizers", "apex: NVIDIA's comes with its PyTorch image")


def why_no_engine() -> str | None:
    """Why Transformer Engine is not here, as a clause after "no"; None where it is."""
    return _why_no(
        "transformer_engine",
        "transformer_engine.pytorch.optimizers",
        "Transformer Engine: pip install 'fp4pretrain[gpu]', or use NVIDIA's PyTorch image",
    )


def _why_no(package: str, module: str, cure: str) -> str | None:
    """The index has another project called apex, and Transformer Engine without its PyTorch part."""
    if importlib.util.find_spec(package) is None:
        return cure
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that is half there raises what it likes
        return f"{cure} (a package {package} is installed, without {module}: {first_line(error)})"
    return None


def _named(kind: type) -> str:
    owner = kind.__module__.partition(".")[0]
    return f"{_WHOSE.get(owner, owner)} {kind.__name__}"
