"""Inputs of a case on another device, strides and gaps included."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Inputs


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device with its shape, strides and storage offset; `Tensor.to` would make it dense.

    What lies in its storage before and between the elements comes along, so that a kernel that reads past a slice
    meets the same NaNs as on the CPU, and an expanded axis still has stride 0 and shares its memory.

    Args:
        tensor: strides are never negative in PyTorch, any else will do.
        device: where to; a copy is made even when the tensor is there already.

    Returns:
        A detached tensor that shares no memory with the one given.
    """
    tensor = tensor.detach()
    shape, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    if not tensor.numel():
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device)
    extent = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = tensor.as_strided((extent,), (1,), 0).to(device, copy=True)
    return storage.as_strided(shape, strides, offset)


def move_inputs(inputs: Inputs, device: torch.device) -> Inputs:
    """Copy the inputs of a case to a device, each as `move` does; nothing requires a gradient there yet."""
    parameters = [None if p is None else move(p, device) for p in inputs.parameters.values()]
    weights = [None if w is None else move(w, device) for w in (inputs.weight_map, inputs.ce_weight)]
    return Inputs([move(z, device) for z in inputs.logits], move(inputs.target, device), *parameters, *weights)
