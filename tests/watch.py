"""Looks at every op that is issued, for what the capture of a CUDA graph would not allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# With a tag that fits masks alone.
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_COPIES = (aten._to_copy.default, aten.copy_.default)


class HostError(AssertionError):
    """An op that a captured CUDA graph could not hold."""


class Watch(TorchDispatchMode):
    """Notes every op, with all its arguments but the values of tensors, and fails on those that involve the host.

    `scalars` says whether tensors may be made of single numbers, as x[0] = 2 does where x is on a CPU.
    """

    def __init__(self, scalars: bool = False) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.scalars = scalars

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXED:
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise HostError("indexing by a mask depends on values")
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise HostError(f"{func} depends on values")
        if func is aten.lift_fresh.default and not (self.scalars and args[0].dim() == 0):
            raise HostError("a tensor is made of data of the host")
        leaves = tree_leaves((args, kwargs))
        given = [t for t in leaves if isinstance(t, Tensor)]
        # A scalar of the CPU may meet a GPU, unless in a copy: its value is an argument of the kernel.
        devices = {t.device for t in given if t.dim() > 0 or func in _COPIES}
        if len(devices) > 1:
            raise HostError(f"{func} is given tensors of {devices}")
        out = func(*args, **kwargs)
        devices |= {t.device for t in tree_leaves(out) if isinstance(t, Tensor)}
        if given and len(devices) > 1:
            raise HostError(f"{func} goes from one to another of {devices}")
        self.ops.append(f"{func} {[(t.dtype, *t.shape) if isinstance(t, Tensor) else t for t in leaves]}")
        return out
