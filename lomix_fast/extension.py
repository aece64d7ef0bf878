"""The compiled extension lomix_fast._C, which holds the kernels for CPU and CUDA tensors: loaded when first asked for.

Importing it registers the ops of the namespace torch.ops.lomix_fast_cpp.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _build_info
from .plan import MixPlan
from .target import Target


@lru_cache(maxsize=1)
def load_error() -> str | None:
    """None once lomix_fast._C is loaded and its ops are registered, otherwise why it could not be."""
    obstacle = _build_info.obstacle()
    if obstacle is not None:
        return obstacle
    try:
        importlib.import_module("lomix_fast._C")
    except ImportError as error:
        return _build_info.not_installed() or (
            f"the extension lomix_fast._C could not be imported ({error}); install a C++ compiler and reinstall with "
            "LOMIX_FAST_BUILD=cpu pip install --no-build-isolation ."
        )
    return None


@lru_cache(maxsize=1)
def cuda_architectures() -> tuple[str, ...]:
    """GPU architectures that the extension has kernels for, such as "8.0" or "9.0+PTX"; empty without CUDA kernels.

    To be called when `load_error` has found none.
    """
    module = importlib.import_module("lomix_fast._C")
    return tuple(getattr(module, "cuda_architectures", tuple)())  # one built before there was a CUDA part lacks it


def no_device(device: torch.device, kind: str = "CUDA") -> str | None:
    """Why torch has no such device of type "cuda", or None; `kind` is how to call those devices."""
    if not torch.cuda.is_available():
        return f"torch sees no {kind} device here; `python -m lomix_fast doctor` shows what it was built for"
    count = torch.cuda.device_count()
    if device.index is not None and not 0 <= device.index < count:
        return f"torch sees {count} {kind} devices, none of them {device}"
    return None


def call_forward(
    ops: Any, logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Call the forward op of a namespace with what backends are given; the target as `for_kernels` makes it."""
    return ops.map_stats_forward(list(logits), *_arguments(target, parameters, plan))


def call_backward(
    ops: Any,
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Call the backward op likewise; its one list comes back as the two that backends return."""
    gradients = ops.map_stats_backward(grad_stats, list(logits), *_arguments(target, parameters, plan))
    scales = len(logits)
    return gradients[:scales], [None if p is None else g for p, g in zip(parameters, gradients[scales:], strict=True)]


def _arguments(target: Target, parameters: Sequence[Tensor | None], plan: MixPlan) -> tuple[Any, ...]:
    """Everything after the logits, in the order of the ops (csrc/inputs.h)."""
    rule = target.rule
    return (
        target.labels,
        target.weight_map,
        target.ce_weight,
        *parameters,
        list(plan.encoded),
        plan.squared,
        plan.bounded,
        plan.sigmoid,
        rule.weighted_ce,
        rule.ignore_index,
        rule.label_smoothing,
    )
