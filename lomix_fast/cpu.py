"""The fused C++ kernel for CPU tensors (csrc/cpu), loaded when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _build_info
from .labels import class_index
from .plan import MixPlan

# Label types the kernel reads as they are; others are turned into int64 first.
_LABEL_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@lru_cache(maxsize=1)
def load_error() -> str | None:
    """None once lomix_fast._C is loaded and its ops are registered, otherwise why it could not be."""
    obstacle = _build_info.obstacle()
    if obstacle is not None:
        return obstacle
    try:
        importlib.import_module("lomix_fast._C")
    except ImportError as error:
        return (
            f"the extension lomix_fast._C could not be imported ({error}); install a C++ compiler and reinstall with "
            "LOMIX_FAST_BUILD=cpu pip install --no-build-isolation ."
        )
    return None


def why_not(device: torch.device) -> str | None:
    """Reason why this backend cannot run on `device`, or None."""
    if device.type != "cpu":
        return f"the cpu backend takes CPU tensors, not {device.type}"
    return load_error()


def forward(
    logits: Sequence[Tensor], target: Tensor, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    if target.dtype not in _LABEL_DTYPES:
        target, _ = class_index(target, logits[0].shape[1])
    return torch.ops.lomix_fast_cpp.map_stats_forward(
        list(logits), target, *parameters, list(plan.encoded), plan.squared
    )


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    if target.dtype not in _LABEL_DTYPES:
        target = target.to(torch.int64)
    gradients = torch.ops.lomix_fast_cpp.map_stats_backward(
        grad_stats, list(logits), target, *parameters, list(plan.encoded), plan.squared
    )
    scales = len(logits)
    return gradients[:scales], [None if p is None else g for p, g in zip(parameters, gradients[scales:], strict=True)]
