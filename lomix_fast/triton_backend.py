"""The Triton kernels (kernels/) for NVIDIA and AMD GPUs, imported when first asked for.

With TRITON_INTERPRET=1 set before triton is imported they run on CPU tensors, in Triton's interpreter: for tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _build_info, extension
from .plan import MixPlan
from .target import Target, check_values, poison_samples, sums_of_kernel

OLDEST = (3, 5)  # the first whose loops can be told to keep invariants out of registers


@lru_cache(maxsize=1)
def load_error() -> str | None:
    """None once the kernels are imported, otherwise why they could not be."""
    try:
        missing = importlib.util.find_spec("triton") is None
    except ValueError:  # what find_spec raises for a module that is None in sys.modules
        missing = True
    if missing:
        return "triton is not installed; run: pip install triton (PyTorch's own GPU builds for Linux bring it)"
    try:
        import triton

        found = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])
        if found < OLDEST:
            return f"triton {triton.__version__} is too old, expected {OLDEST[0]}.{OLDEST[1]} or newer; upgrade torch"
        not_installed = _build_info.not_installed()
        if not_installed is not None:
            return not_installed
        from .kernels import launch  # noqa: F401
    except Exception as error:  # a broken installation can fail in any way, and others must go on working
        return f"the triton kernels could not be imported ({type(error).__name__}: {error}); reinstall triton"
    return None


def why_not(device: torch.device) -> str | None:
    """Reason why this backend cannot run on `device`, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"the triton backend takes CUDA or ROCm tensors, not {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "the triton backend takes CUDA or ROCm tensors, not cpu (TRITON_INTERPRET=1, set before the first import, "
            "runs it in triton's interpreter, slowly)"
        )
    error = load_error()
    if error is not None:
        return error
    from .kernels.config import interpreted, interpreter_fault

    if device.type == "cuda":
        missing = extension.no_device(device, "CUDA or ROCm")
        if missing is not None:
            return missing
    if interpreted():
        fault = interpreter_fault()
        if fault is not None:
            return fault
    elif device.type == "cpu":
        return "TRITON_INTERPRET=1 was set after triton was imported; set it before"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
        return f"triton needs compute capability 7.0 or newer, {torch.cuda.get_device_name(device)} is older"
    return None


def forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    from .kernels import launch

    num_classes = logits[0].shape[1]
    check_values(target, num_classes)
    stats, counts = launch.forward(logits, target, parameters, plan)
    return sums_of_kernel(target, stats, counts, plan.squared)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    from .kernels import launch

    return launch.backward(poison_samples(grad_stats, target), logits, target, parameters, plan)
