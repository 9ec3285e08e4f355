"""megatron-core imported without what it loads on the side: a third of a process's start.

megatron-core marks functions for ``torch.compile`` where it defines them, which loads PyTorch's compiler
(3 s on a laptop's core), and imports wandb for its inference server (1 s). A run calls none of the
functions: fused kernels of our own stand in their place, and what is left runs uncompiled.

``import_lean`` is asked by ``fp4pretrain/__init__.py``, so that it counts whichever module comes to import
megatron-core first. Where that happened before fp4pretrain was imported, nothing changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "megatron.core"


def import_lean() -> None:
    """Have the first import of megatron-core in this process load neither PyTorch's compiler nor wandb."""
    if _NAME not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds megatron-core where Python finds it, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Lean(spec.loader)
        return spec


class _Lean(Loader):
    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._real
        with _without_side_loads():
            self._real.exec_module(module)


@contextmanager
def _without_side_loads() -> Iterator[None]:
    import torch

    compile_, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
    hides_wandb = "wandb" not in sys.modules
    if hides_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # importing it is an ImportError
    try:
        yield
    finally:
        torch.compile = compile_
        if hides_wandb:
            del sys.modules["wandb"]


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """In place of ``torch.compile``, also where it is called with options and returns a decorator."""
    return _as_it_is if function is None else function
