"""Triton's interpreter, made quicker for kernels of many small functions."""

from __future__ import annotations

import importlib.util


def spare_repeated_patching() -> None:
    """Patch triton.language once a module instead of at every call of a device function, a third of the time.

    The interpreter replaces the functions of triton.language when a kernel starts, and again, by introspection of the
    whole module, whenever one device function calls another. Only functions of triton's own modules need that: ours
    see the module that the kernel's start has patched.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
