"""NVIDIA's optional packages, Transformer Engine and apex: are they here, and why not."""

from __future__ import annotations

import importlib
import importlib.util

from fp4pretrain.errors import first_line


def why_no_apex() -> str | None:
    """Why NVIDIA's apex is not here, as a clause after "no"; None where it is."""
    return _why_no("apex", "apex.optimizers", "apex: NVIDIA's comes with its PyTorch image")


def why_no_engine() -> str | None:
    """Why Transformer Engine is not here, as a clause after "no"; None where it is."""
    return _why_no(
        "transformer_engine",
        "transformer_engine.pytorch",
        "Transformer Engine: pip install 'fp4pretrain[gpu]', or use NVIDIA's PyTorch image",
    )


def _why_no(package: str, module: str, cure: str) -> str | None:
    """As the public functions. On the package index, apex is another project, and Transformer Engine can
    lack its PyTorch part."""
    if importlib.util.find_spec(package) is None:
        return cure
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that is half there raises what it likes
        return f"{cure} (a package {package} is installed, without {module}: {first_line(error)})"
    return None
