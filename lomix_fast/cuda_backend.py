"""The fused CUDA C++ kernels for NVIDIA GPUs (csrc/cuda), part of the same extension as those for CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _build_info, extension
from .plan import MixPlan
from .target import Target, check_values, for_kernels, poison_samples, sums_of_kernel

# Systems on a chip: machine code for other GPUs of the same major version does not run there, nor theirs elsewhere.
_TEGRA = {(7, 2), (8, 7), (10, 1), (11, 0)}


def why_not(device: torch.device) -> str | None:
    """Reason why this backend cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"the cuda backend takes CUDA tensors, not {device.type}"
    if torch.version.hip:
        return (
            f"the cuda backend is for NVIDIA GPUs, this torch {torch.__version__} is built for ROCm; "
            "the triton backend takes its tensors"
        )
    error = extension.load_error()
    if error is not None:
        return error
    built = extension.cuda_architectures()
    if not built:
        reason = _build_info.read().get("cuda_skipped", "its build has recorded no reason")
        return (
            f"the extension lomix_fast._C was built without CUDA kernels: {reason}; "
            f"to build them, {_build_info.reinstall('cuda')}"
        )
    missing = extension.no_device(device)
    if missing is not None:
        return missing
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs(one, capability) for one in built):
        its = "{}.{}".format(*capability)
        return (
            f"the CUDA kernels were built for compute capability {' '.join(built)}, but "
            f"{torch.cuda.get_device_name(device)} has {its}; to build them for it, "
            f"{_build_info.reinstall('cuda', its)}"
        )
    return None


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code built for an architecture runs on a GPU.

    Machine code runs on the same major version with the same minor version or a later one, PTX on everything later, and
    what was built for "9.0a" on 9.0 alone.
    """
    number = architecture.removesuffix("+PTX")
    major, minor = (int(part) for part in number.removesuffix("a").split("."))
    if number.endswith("a"):
        return (major, minor) == capability
    if capability in _TEGRA or (major, minor) in _TEGRA:
        return (major, minor) == capability or (capability > (major, minor) and architecture.endswith("+PTX"))
    return capability >= (major, minor) and (capability[0] == major or architecture.endswith("+PTX"))


def forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    check_values(target, logits[0].shape[1])
    return run_forward(torch.ops.lomix_fast_cpp, logits, target, parameters, plan)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    return run_backward(torch.ops.lomix_fast_cpp, grad_stats, logits, target, parameters, plan)


def run_forward(
    ops: Any, logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """The forward pass by the ops of a namespace. The kernels count labels; the sums of other targets are made here."""
    num_classes = logits[0].shape[1]
    stats, counts = extension.call_forward(ops, logits, for_kernels(target, num_classes), parameters, plan)
    return sums_of_kernel(target, stats, counts, plan.squared)


def run_backward(
    ops: Any,
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The backward pass by the ops of a namespace."""
    num_classes = logits[0].shape[1]
    grad_stats = poison_samples(grad_stats, target)
    return extension.call_backward(ops, grad_stats, logits, for_kernels(target, num_classes), parameters, plan)
