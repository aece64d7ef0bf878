"""What the maps are held against: labels, weights of pixels and classes, and the rules that read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .labels import KERNEL_DTYPES, class_index, invalid_shares, may_look, poison

# Of the largest weight of a pixel, and 1 / this: sums of larger or smaller ones leave float32. kLargestWeight in
# csrc/cpu/check_values.cpp.
LARGEST_WEIGHT = 1e20


@dataclass(frozen=True)
class TargetRule:
    """How a target is read; no tensors.

    Attributes:
        ignore_index: pixels with this label have weight 0 everywhere, or None.
        label_smoothing: share of the cross-entropy target that is spread over all classes, 0 to 1, as
            torch.nn.CrossEntropyLoss has it. Dice is not smoothed.
        weighted_ce: whether `weight_map` weighs cross-entropy too, or Dice alone.
    """

    ignore_index: int | None = None
    label_smoothing: float = 0.0
    weighted_ce: bool = True

    @property
    def key(self) -> str:
        """The rule as text, which passes through torch.library schemas; "" for the plain one."""
        parts = [] if self.ignore_index is None else [f"ignore={self.ignore_index}"]
        parts += [f"smooth={self.label_smoothing!r}"] if self.label_smoothing else []
        parts += [] if self.weighted_ce else ["ce=1"]
        return ";".join(parts)

    @staticmethod
    def from_key(key: str) -> TargetRule:
        """Return the rule whose `key` this is.

        Raises:
            ValueError: the text is not such a key.
        """
        try:
            fields = dict(part.split("=") for part in key.split(";")) if key else {}
            ignore = int(fields["ignore"]) if "ignore" in fields else None
            rule = TargetRule(ignore, float(fields.get("smooth", "0")), "ce" not in fields)
        except ValueError:
            rule = None
        if rule is None or rule.key != key:
            raise ValueError(f"rule: got {key!r}, expected the text of TargetRule.key, such as '' or 'ignore=255'")
        return rule


@dataclass(frozen=True)
class Target:
    """The target of one call, as backends take it.

    Attributes:
        labels: class numbers [B, *full] of any integer, bool or whole-number float dtype; or, when `dense`, one value
            from 0 to 1 a class, [B, C, *full] of any dtype but complex.
        dense: which of the two.
        weight_map: [B, *full], float or bool, or None: 1 everywhere.
        ce_weight: [C] in float32 or float64, or None: 1. Weight of each class in cross-entropy; under sigmoid that of
            its positives.
        rule: the rest.
        exclusive: whether a pixel has one class (softmax) or may have several (sigmoid).
    """

    labels: Tensor
    dense: bool = False
    weight_map: Tensor | None = None
    ce_weight: Tensor | None = None
    rule: TargetRule = TargetRule()
    exclusive: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether these are class numbers that all count alike, which is what kernels are tuned for."""
        return not self.dense and self.weight_map is None and self.ce_weight is None and self.rule == TargetRule()

    @property
    def full(self) -> torch.Size:
        """Full spatial size."""
        return self.labels.shape[2 if self.dense else 1 :]


@dataclass(frozen=True)
class Pixels:
    """A target read out: what every pixel contributes, in the dtype of the sums.

    Attributes:
        index: class numbers int64 [B, *full], -1 where the label is ignored, 0 where it is no class; None for a dense
            target.
        dense: the dense target [B, C, *full] in its own dtype, or None.
        dice_weight, ce_weight: [B, *full], or None: 1 everywhere. Class weights are not in them.
        invalid: bool [B, ..] of labels that are no class or shares outside 0 to 1, for `poison`; None if they raise.
    """

    index: Tensor | None
    dense: Tensor | None
    dice_weight: Tensor | None
    ce_weight: Tensor | None
    invalid: Tensor | None

    def one_hot(self, num_classes: int) -> Tensor:
        """The target of Dice, one value a class: [B, C, *full] of any dtype."""
        if self.index is None:
            assert self.dense is not None
            return self.dense
        classes = torch.arange(num_classes, device=self.index.device).view(-1, *[1] * (self.index.dim() - 1))
        return self.index.unsqueeze(1) == classes


def read_target(target: Target, num_classes: int, dtype: torch.dtype) -> Pixels:
    """Labels as numbers and weights as they multiply.

    Raises:
        ValueError: on CPU, a label that is no class and not ignored, a dense value outside 0 to 1, or a weight below 0.
    """
    labels, valid = _without_ignored(target)
    if target.dense:
        index, dense = None, labels
        invalid = invalid_shares(labels, target.labels, target.exclusive)
        valid = None if valid is None else valid[:, 0]  # one channel, as map_stats makes sure of
    else:
        dense = None
        index, invalid = class_index(labels, num_classes)
        index = index if valid is None else index.masked_fill(~valid, -1)
    check_weights(target.weight_map)
    mask = None if valid is None else valid.to(dtype)
    dice = None if target.weight_map is None else target.weight_map.to(dtype)
    if valid is not None:
        dice = mask if dice is None else dice.masked_fill(~valid, 0)
    return Pixels(index, dense, dice, dice if target.rule.weighted_ce else mask, invalid)


def check_weights(weight_map: Tensor | None) -> None:
    """Raise ValueError for a weight of a pixel below 0, or for all of them far from 1, where the host may look."""
    if weight_map is None or weight_map.dtype == torch.bool or weight_map.numel() == 0:
        return
    if not may_look(weight_map.device):
        return
    largest = weight_map.max().item()
    if math.isfinite(largest) and (largest > LARGEST_WEIGHT or 0 < largest * LARGEST_WEIGHT < 1):
        raise ValueError(
            f"weight_map: got {largest:.9g} as the largest weight, expected 0 or {1 / LARGEST_WEIGHT:g} to "
            f"{LARGEST_WEIGHT:g}, for sums of float32 to hold them; multiply all of them by the same number"
        )
    negative = weight_map < 0
    if negative.any():
        where = tuple(negative.nonzero()[0].tolist())
        raise ValueError(
            f"weight_map: got the weight {weight_map[where].item():.9g} at index {where}, expected at least 0; shift "
            "or clamp the weights"
        )


def _without_ignored(target: Target) -> tuple[Tensor, Tensor | None]:
    """The labels in a type that PyTorch computes with, 0 where they are ignored; and where they are not, or None."""
    labels, ignore = target.labels, target.rule.ignore_index
    if not labels.is_floating_point() and labels.dtype not in KERNEL_DTYPES:
        labels = labels.to(torch.int64)  # PyTorch computes with few of the unsigned types
    if ignore is None:
        return labels, None
    valid = labels != ignore
    return labels.masked_fill(~valid, 0), valid


def poison_samples(grad_stats: Tensor, target: Target) -> Tensor:
    """dLoss/dstats [B, M, 1 + 2C], NaN for samples of a dense target with a value that is none.

    Of class numbers the kernels see that themselves.
    """
    if not target.dense:
        return grad_stats
    labels, _ = _without_ignored(target)
    return poison(grad_stats, invalid_shares(labels, target.labels, target.exclusive))


def ce_factors(target: Target, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a [C], b [C]): with y the target of a pixel, cross-entropy takes t_c = a_c y_c + b_c as its share of class c.

    Source: torch.nn.CrossEntropyLoss, `weight` and `label_smoothing`.
    """
    weight = target.ce_weight
    if weight is None:
        weight = torch.ones(num_classes, dtype=dtype, device=target.labels.device)
    weight, smoothing = weight.to(dtype), target.rule.label_smoothing
    return weight * (1 - smoothing), weight * (smoothing / num_classes)


def target_stats(
    pixels: Pixels, ce_weight: Tensor | None, num_classes: int, dtype: torch.dtype, squared: bool
) -> Tensor:
    """What recipes need to know of the target alone: [B, 1 + C].

    Column 0 is what the cross-entropy of a sample is divided by: the sum of its pixels' weights, each times the class
    weight of its label where labels are class numbers (torch.nn.CrossEntropyLoss). The others are the sums of weight
    times y_c (y_c^2 if `squared`) that Dice needs. Works class by class, so nothing as large as C maps is made.
    """
    where = pixels.index if pixels.index is not None else pixels.dense
    assert where is not None
    axes = tuple(range(1, where.dim() - (pixels.index is None)))

    # Few devices lack float64, and there counts stay exact as integers.
    wide = dtype if where.device.type in ("mps", "xpu") else torch.float64

    def total(weight: Tensor | None, values: Tensor) -> Tensor:
        if weight is None and not values.is_floating_point():
            return values.sum(axes, dtype=torch.int64).to(wide)
        return (values if weight is None else values * weight).sum(axes, dtype=wide)

    if ce_weight is not None and pixels.index is not None:
        count = ce_weight.to(dtype)[pixels.index]  # -1, the last, where the weight of the pixel is 0
    else:
        count = torch.ones((), dtype=dtype, device=where.device).expand(where.shape[0], *where.shape[-len(axes) :])
    columns = [total(pixels.ce_weight, count)]
    for c in range(num_classes):
        if pixels.index is not None:
            y = pixels.index == c
        else:
            assert pixels.dense is not None
            y = pixels.dense[:, c]
            y = y.to(dtype).square() if squared and y.is_floating_point() else y
        columns.append(total(pixels.dice_weight, y))
    return torch.stack(columns, dim=1).to(dtype)


def for_kernels(target: Target, num_classes: int) -> Target:
    """The target with labels of a type that compiled kernels read.

    Class numbers become integers, those that are no class a number that is none either, nor `ignore_index`. Dense
    values stay what they are but for the unsigned types that few programs know.

    Raises:
        ValueError: on CPU, a class number that is not whole or no class.
    """
    labels = target.labels
    if labels.dtype in KERNEL_DTYPES or (target.dense and labels.is_floating_point()):
        return target
    if target.dense:
        return replace(target, labels=labels.to(torch.int64))
    ignore = target.rule.ignore_index
    numbers = labels.to(torch.int64)
    valid = None if ignore is None else numbers != ignore
    if labels.is_floating_point() and valid is not None:
        valid |= numbers != labels
    exact = labels if labels.is_floating_point() else numbers
    _, invalid = class_index(exact if valid is None else exact.masked_fill(~valid, 0), num_classes)
    if invalid is not None:
        numbers = numbers.masked_fill(invalid, num_classes if ignore != num_classes else num_classes + 1)
    return replace(target, labels=numbers)


def sums_of_kernel(target: Target, stats: Tensor, counts: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """(stats, target_stats) of a kernel that has counted labels, completed by what it has not looked at.

    Args:
        target: what it was given.
        stats: [B, M, 1 + 2C].
        counts: [B, 1 + C], pixels and those of each class that are not ignored; of no use for other targets.
        squared: as `target_stats`.
    """
    if target.is_plain:
        return stats, counts
    if not target.dense and target.weight_map is None and target.ce_weight is None:
        return stats, torch.cat([counts[:, 1:].sum(1, keepdim=True), counts[:, 1:]], 1)
    num_classes = counts.shape[1] - 1
    pixels = read_target(target, num_classes, stats.dtype)
    return poison(stats, pixels.invalid), target_stats(pixels, target.ce_weight, num_classes, stats.dtype, squared)


def check_values(target: Target, num_classes: int) -> None:
    """Raise for labels that are no class and dense values outside 0 to 1, where the host may look at them."""
    if may_look(target.labels.device):
        read_target(target, num_classes, torch.float32)
