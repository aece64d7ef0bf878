"""The CUDA kernels on the host as one more backend, "cuda_host", for every test that takes backends from the table.

conftest.py registers it where CUDA_HOST_LIBRARY names the library; test_cuda_host.py starts such a pytest.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from lomix_fast import extension
from lomix_fast.backends import BACKENDS, Backend
from lomix_fast.cuda_backend import run_backward, run_forward
from lomix_fast.plan import MixPlan
from lomix_fast.target import Target, check_values

NAME = "cuda_host"


def register() -> None:
    """Load the library and add the row."""
    path = os.environ["CUDA_HOST_LIBRARY"]
    ctypes.CDLL(path, mode=os.RTLD_LAZY)
    torch.ops.load_library(path)
    BACKENDS[NAME] = Backend(
        NAME, lambda device: None if device.type == "cpu" else "runs on the CPU", _forward, backward
    )


def library() -> ctypes.CDLL:
    """The library, for what is not an op: cuda_host_seed, cuda_host_device."""
    return ctypes.CDLL(os.environ["CUDA_HOST_LIBRARY"], mode=os.RTLD_LAZY)


def unchecked_forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """As on a GPU, where labels that are no class do not raise."""
    return extension.call_forward(torch.ops.lomix_fast_cuda_host, logits, target, parameters, plan)


def _forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    check_values(target, logits[0].shape[1])  # raises on a CPU
    return run_forward(torch.ops.lomix_fast_cuda_host, logits, target, parameters, plan)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    return run_backward(torch.ops.lomix_fast_cuda_host, grad_stats, logits, target, parameters, plan)
