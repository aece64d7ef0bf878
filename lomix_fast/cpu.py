"""The fused C++ kernel for CPU tensors (csrc/cpu), part of the extension lomix_fast._C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import extension
from .plan import MixPlan
from .target import Target, for_kernels


def why_not(device: torch.device) -> str | None:
    """Reason why this backend cannot run on `device`, or None."""
    if device.type != "cpu":
        return f"the cpu backend takes CPU tensors, not {device.type}"
    return extension.load_error()


def forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    target = for_kernels(target, logits[0].shape[1])
    return extension.call_forward(torch.ops.lomix_fast_cpp, logits, target, parameters, plan)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    target = for_kernels(target, logits[0].shape[1])
    return extension.call_backward(torch.ops.lomix_fast_cpp, grad_stats, logits, target, parameters, plan)
