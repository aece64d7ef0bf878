"""One call in the form that kernels take: sizes, strides, and what they are compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ..plan import MixPlan
from ..target import Target, ce_factors
from . import tables
from .config import Config, axes, dot_precision, target_of, vector
from .config import Target as Device
from .maps import OPERATORS, USUAL


@dataclass
class Problem:
    """Everything both passes need.

    Attributes:
        plan, logits: as given.
        target: class numbers [B, *full] or a dense target [B, C, *full], in its own memory.
        weight: weights of pixels [B, *full], or anything when not WEIGHTED.
        factors: a and b of targets.py, [2, C], or anything when not GENERAL.
        target_fields: TARGET_FIELDS of pixels.py.
        flags: what the kernels are compiled for about plan and target.
        parameters: W, b, u, v, in the accumulator's type.
        accumulator: type of products and sums.
        full, native: size of the labels, and of each scale.
        used: whether each scale enters a map.
        on: the device.
    """

    plan: MixPlan
    logits: Sequence[Tensor]
    target: Tensor
    weight: Tensor
    factors: Tensor
    target_fields: tuple[int, ...]
    flags: dict[str, bool]
    parameters: tuple[Tensor, Tensor, Tensor, Tensor]
    accumulator: torch.dtype
    full: tables.Size
    native: tuple[tables.Size, ...]
    used: tuple[bool, ...]
    on: Device

    @property
    def batch(self) -> int:
        """B."""
        return self.logits[0].shape[0]

    @property
    def classes(self) -> int:
        """C."""
        return self.logits[0].shape[1]

    @property
    def key(self) -> tuple[object, ...]:
        """What the best configuration depends on."""
        flags = tuple(self.flags.values())
        return self.device, self.classes, len(self.logits), axes(self.full), self.accumulator, flags

    @property
    def target_rows(self) -> int:
        """Scratch rows that a tile's target takes, see targets.py."""
        return 1 + 2 * self.flags["GENERAL"] + self.classes * self.flags["DENSE"]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.logits[0].device

    def geometry(self, tile: tables.Size, grads: Sequence[Tensor]) -> tables.Geometry:
        """Sizes and strides under one shape of tile."""
        return tables.geometry(
            self.full,
            self.native,
            tile,
            tuple(_strides(z.stride(), 2) for z in self.logits),
            tuple(_strides(g.stride(), 2) for g in grads),
            self.target_fields,
            self.used,
            self.batch,
            self.classes,
        )

    def constants(self, config: Config, most: int, wide: bool) -> dict[str, object]:
        """Arguments that the kernels are compiled for, apart from those of one pass."""
        few = vector(self.classes, most)
        return {
            "CT": few,
            "MANY": self.classes > few,
            "DIMS": 3 if self.full[0] > 1 or any(n[0] > 1 for n in self.native) else 2,
            "TZ": config.tile[0],
            "TY": config.tile[1],
            "TX": config.tile[2],
            "BLOCK": min(config.block, config.size),
            "SPAN": min(config.span, config.size),
            "DOT": dot_precision(self.on),
            "ACC": tl.float64 if self.accumulator == torch.float64 else tl.float32,
            "WIDE": wide,
            **self.flags,
        }


def empty_gradients(problem: Problem) -> list[Tensor]:
    """Room for the gradients of the logits; zeros for scales that no map uses, which no kernel writes."""
    both = zip(problem.logits, problem.used, strict=True)
    return [torch.empty_like(z) if used else torch.zeros_like(z) for z, used in both]


def _strides(strides: Sequence[int], leading: int) -> tuple[int, ...]:
    """Strides over the leading axes and z, y, x; 0 along an axis that is not there."""
    return (*strides[:leading], *[0] * (3 - len(strides) + leading), *strides[leading:])


def size_in_space(shape: Sequence[int]) -> tables.Size:
    """A spatial shape along z, y and x; 1 along an axis that is not there."""
    z, y, x = (*[1] * (3 - len(shape)), *shape)
    return z, y, x


def _fields(target: Target) -> tuple[int, ...]:
    """What kernels need to know of the target besides its memory: TARGET_FIELDS of pixels.py."""
    labels, ignore = target.labels.stride(), target.rule.ignore_index
    leading = 2 if target.dense else 1
    strides = _strides((labels[0], *labels[leading:]), 1)
    weight = (0,) * 4 if target.weight_map is None else _strides(target.weight_map.stride(), 1)
    over_classes = labels[1] if target.dense else 0
    return (*strides, over_classes, *weight, int(ignore is not None), ignore or 0, int(target.rule.weighted_ce))


def _readable(values: Tensor) -> Tensor:
    """The same memory in a type that kernels read."""
    return values.view(torch.uint8) if values.dtype == torch.bool else values


def prepare(logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan) -> Problem:
    """Put a call together; nothing as large as an image is copied."""
    accumulator = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    device, is_general = target.labels.device, plan.sigmoid or not target.is_plain
    nothing = torch.empty(1, dtype=accumulator, device=device)  # for a tensor that is not needed
    filled = [nothing if p is None else p.to(accumulator).contiguous() for p in parameters]
    return Problem(
        plan,
        logits,
        _readable(target.labels),
        nothing if target.weight_map is None else _readable(target.weight_map),
        torch.stack(ce_factors(target, logits[0].shape[1], accumulator)) if is_general else nothing,
        _fields(target),
        {
            "SQUARED": plan.squared,
            "SIGMOID": plan.sigmoid,
            "GENERAL": is_general,
            "DENSE": target.dense,
            "WEIGHTED": target.weight_map is not None,
            "EXTRA": any(one.operator in OPERATORS[USUAL.value :] for one in plan.maps),
            "BOUNDED": plan.bounded and any(one.operator == "mul" for one in plan.maps),
        },
        (filled[0], filled[1], filled[2], filled[3]),
        accumulator,
        size_in_space(target.full),
        tuple(size_in_space(z.shape[2:]) for z in logits),
        tuple(i in plan.used_scales for i in range(len(logits))),
        target_of(device),
    )
