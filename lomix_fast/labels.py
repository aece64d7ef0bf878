"""Labels as class numbers, and what happens to those that are not."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Types that the compiled kernels read as they are; labels of others are turned into int64 first.
KERNEL_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# How far a float share of a class may lie outside 0 to 1; csrc/cpu/check_values.cpp has the same.
SHARE_SLACK = 1e-3


def class_index(target: Tensor, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Turn labels of any integer, bool or whole-number float type into int64 class numbers.

    Args:
        target: labels [B, *full].
        num_classes: C; valid labels are 0 .. C-1.

    Returns:
        index: int64 [B, *full], every entry in [0, C).
        invalid: None on CPU, where bad labels raise; elsewhere a bool tensor [B, *full] of bad labels, because raising
            would make the host wait for the device. `poison` turns it into NaN; LOMIX_FAST_DEBUG=1 raises everywhere.

    Raises:
        ValueError: a label outside [0, C), or a float label with a fraction.
    """
    index = target.to(torch.int64)
    invalid = (index < 0) | (index >= num_classes)
    if target.is_floating_point():
        invalid = invalid | (index != target)
    if may_look(target.device):
        if invalid.any():
            raise ValueError(_complaint(target, invalid, num_classes))
        return index, None
    return index.masked_fill(invalid, 0), invalid


def invalid_shares(values: Tensor, original: Tensor, exclusive: bool) -> Tensor | None:
    """Look for values of a dense target [B, C, *full] that are not from 0 to 1, class by class to save memory.

    Floats may miss the range by `SHARE_SLACK`: masks that were resized or blurred do, by rounding.

    Args:
        values: the target, 0 where it is ignored.
        original: the target as it was given, for the message.
        exclusive: whether one class excludes another, so that marks (bool, integers) must name exactly one.

    Returns:
        None on CPU, where they raise; elsewhere a bool tensor [B, 1 or 2]: true for samples with such a value.

    Raises:
        ValueError: a value below 0, above 1, or NaN; marks of no class or of several where they exclude each other.
    """
    are_marks = not values.is_floating_point()
    slack = 0 if are_marks else SHARE_SLACK
    found = []
    if values.dtype != torch.bool:
        each = [_outside(one, slack).flatten(1).any(1) for one in values.unbind(1)]  # C of [B]
        found.append(torch.stack(each).any(0))
    if are_marks and exclusive and values.shape[1] > 1:
        found.append((values.sum(1, dtype=torch.int32) != 1).flatten(1).any(1))
    if not found:
        return None
    invalid = torch.stack(found, 1)  # [B, 1 or 2]
    if not may_look(values.device):
        return invalid
    if not invalid.any():
        return None
    if values.dtype != torch.bool and found[0].any():
        where = tuple(_outside(values, slack).nonzero()[0].tolist())
        raise ValueError(
            f"target: got the value {original[where].item():.9g} at index {where}, expected shares of each class from "
            "0 to 1; masks of 0 and 255 must be divided or thresholded first, and pixels without a label left out with "
            "ignore_index= or mask="
        )
    marks = values.sum(1, dtype=torch.int32)
    place = tuple((marks != 1).nonzero()[0].tolist())
    raise ValueError(
        f"target: got marks of {int(marks[place])} classes at pixel {place}, expected exactly one under softmax; for "
        "regions that overlap pass sigmoid=True, and leave pixels without a class out with mask="
    )


def _outside(values: Tensor, slack: float) -> Tensor:
    return ~((values >= -slack) & (values <= 1 + slack))  # true for NaN


def may_look(device: torch.device) -> bool:
    """Whether labels may be read by the host: always on CPU, elsewhere only when debugging."""
    return device.type == "cpu" or os.environ.get("LOMIX_FAST_DEBUG") == "1"


def poison(stats: Tensor, invalid: Tensor | None) -> Tensor:
    """Make the statistics [B, M, 1 + 2C] of every sample with a bad label NaN, without a host sync."""
    if invalid is None:
        return stats
    bad = invalid.flatten(1).any(1).view(-1, 1, 1)
    # A factor rather than a fill, so that the gradient is NaN too and GradScaler skips the step.
    return stats * torch.ones_like(bad, dtype=stats.dtype).masked_fill(bad, float("nan"))


def _complaint(target: Tensor, invalid: Tensor, num_classes: int) -> str:
    where = tuple(invalid.nonzero()[0].tolist())
    value = target[where].item()
    if isinstance(value, float) and not value.is_integer():
        return (
            f"target: got the label {value} at index {where}, expected whole class numbers; "
            "soft or resized masks must be rounded or thresholded first"
        )
    is_wrapped = target.dtype == torch.uint8 and value > 127  # as csrc/cpu/check_values.cpp says it
    of_sign = f", which is what {value - 256} becomes in uint8" if is_wrapped else ""
    return (
        f"target: got the label {value} at index {where}, expected labels in [0, {num_classes}) for {num_classes} "
        f"classes; remap the labels, raise num_classes, or pass ignore_index={value:.0f}{of_sign}"
    )
