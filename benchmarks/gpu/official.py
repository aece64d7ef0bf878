"""What the literal loss does in one step, counted on a small problem: bytes moved, launches, waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lomix_fast import LoMixLoss
from lomix_fast.testing.cases import Case, make_inputs
from lomix_fast.testing.official_style import OfficialStyleLoss, official_style_step

_IMAGE = {2: (64, 64), 3: (16, 16, 16)}
# They only make room, or look.
_NOTHING = ("empty", "set_", "detach", "alias", "_unsafe_view", "lift_fresh", "sym_", "is_", "stride", "size")


@dataclass(frozen=True)
class Step:
    """One training step's cost.

    Attributes:
        bytes: read and written by all operations.
        launches: operations that do something on the device.
        syncs: operations whose result the host waits for.
        pixels: of the problem that it was counted on.
    """

    bytes: int
    launches: int
    syncs: int
    pixels: int


class Traffic(TorchDispatchMode):
    """Counts, for every aten operation that is no view, the bytes of its inputs and outputs, and the operation.

    An expanded tensor counts with the elements that exist. An operation that a device would do in several launches
    counts as one, so all figures are at least these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")
        if name[0] != "aten":
            return out
        if name[1].startswith(("_local_scalar_dense", "equal")):
            self.syncs += 1
        elif not name[1].startswith(_NOTHING) and not getattr(func, "is_view", False):
            inputs, outputs = _tensors((args, kwargs)), _tensors(out)
            at = {t.untyped_storage().data_ptr() for t in inputs}
            shared = outputs and all(t.untyped_storage().data_ptr() in at for t in outputs)
            if shared and not func._schema.is_mutable:
                return out  # a reshape or a conversion that did nothing
            self.launches += 1
            self.bytes += sum(map(_size, inputs)) + sum(map(_size, outputs))
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _size(tensor: Tensor) -> int:
    elements = 1
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= n if stride else 1
    return elements * tensor.element_size()


def _count(classes: int, dims: int, ratios: tuple[int, ...], step: Callable[[Any], Tensor]) -> Step:
    image = _IMAGE[dims]
    native = tuple(tuple(max(1, n // ratio) for n in image) for ratio in ratios)
    inputs = make_inputs(Case("counted", 1, classes, image, native)).requires_grad_()
    with Traffic() as traffic:
        step(inputs).backward()
    return Step(traffic.bytes, traffic.launches, traffic.syncs, inputs.target[0].numel())


@lru_cache(maxsize=16)
def official_step(classes: int, dims: int, ratios: tuple[int, ...]) -> Step:
    """Forward and backward of the literal loss on a small problem; bytes grow with the pixels, launches do not.

    Args:
        classes: C.
        dims: 2 or 3.
        ratios: full size over native size of each scale, coarsest first.
    """
    loss = OfficialStyleLoss(classes, len(ratios))
    return _count(
        classes,
        dims,
        ratios,
        lambda i: official_style_step(loss, i.logits, i.target, i.cat_weight, i.cat_bias),
    )


@lru_cache(maxsize=16)
def rest_of_ours(classes: int, dims: int, ratios: tuple[int, ...]) -> Step:
    """What LoMixLoss does around its kernels: the loss out of the statistics, and the gradient of that."""
    loss = LoMixLoss(classes, len(ratios), impl="cpu")
    return _count(classes, dims, ratios, lambda i: loss(i.logits, i.target))


def official_memory(classes: int, scales: int, pixels: int) -> int:
    """Bytes of float32 maps that the official loss holds at its peak, by the formula of its own code.

    3 (L + 4 S) + 2 K + (K - 2 S) + K / C maps for the backward pass and 4 S mixed maps besides, S subsets of at
    least two scales, K members of all of these.

    Args:
        classes, scales: C, L.
        pixels: of all samples of the batch.
    """
    subsets = 2**scales - 1 - scales
    members = scales * 2 ** (scales - 1) - scales
    kept = 3 * (scales + 4 * subsets) + 2 * members + (members - 2 * subsets) + members / classes
    return round((kept + 4 * subsets) * classes * pixels * 4)
