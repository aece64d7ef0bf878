"""Which copy of the compiled kernels runs: vector instructions by ATen's names, from the baseline up."""

from __future__ import annotations

import importlib

import torch

import build_cpp
from lomix_fast import _build_info, extension

ORDER = tuple(build_cpp.CAPABILITIES)
VARIABLE = "LOMIX_FAST_CPU_CAPABILITY"
_TITLES = {"AVX512": "AVX-512"}


def in_use() -> str:
    """The capability of the fused kernel in this process, or that of torch where the extension cannot be loaded."""
    if extension.load_error() is not None:
        return torch.backends.cpu.get_cpu_capability()
    return str(importlib.import_module("lomix_fast._C").cpu_capability())


def why_not(capability: str) -> str | None:
    """Reason why kernels for `capability`, a name out of `ORDER`, cannot run here; None when they can."""
    here = torch.backends.cpu.get_cpu_capability()
    if ORDER.index(capability) > (ORDER.index(here) if here in ORDER else 0):
        return f"this CPU has no {_TITLES.get(capability, capability)}"
    built = _build_info.read().get("capabilities")
    if built is not None and capability not in built.split():
        return f"the extension was built without {_TITLES.get(capability, capability)}"
    return None
