"""Triton's interpreter without half of its work: ``triton.language`` is patched once a launch."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Spare the interpreter searches that find nothing.

    Before a launch it replaces the functions of ``triton.language`` by its own, and after it puts them back.
    At each call of one jitted function by another it searches the whole language for functions to replace,
    though all are replaced already: half of the time that small kernels take.
    """
    whole = getattr(interpreter, "_patch_lang", None)
    if whole is None:  # another Triton
        return
    visible: dict[int, frozenset[int]] = {}  # by the names of a module: the languages among them
    patched: set[int] = set()  # by the launch at hand

    def patch(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in visible:
            languages = frozenset(id(v) for v in names.values() if v is tl or v is tl.core)
            visible[id(names)] = languages
        if visible[id(names)] <= patched:
            return interpreter._LangPatchScope()
        scope = whole(function)
        patched.update(visible[id(names)])
        restore = scope.restore

        def restore_all() -> None:
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch
