"""Which pixels count, and how much: a mask, weights and the structure loss of one call made into one weight map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_dense, check_target, check_weight_map, plain
from .reference import compute_dtype
from .structure import structure_weights


def weigh_pixels(
    target: Any,
    first: Tensor,
    *,
    mask: Any = None,
    weight_map: Any = None,
    structure: bool = False,
    sigmoid: bool = False,
    ignore_index: int | None = None,
    weighted_ce: bool = True,
) -> tuple[Any, Tensor | None, int | None]:
    """Combine what weighs pixels into the arguments of `map_stats`.

    Args:
        target: as `map_stats` takes it.
        first: one of the logits [B, C, *native], already checked.
        mask: None, or [B, *full] or [B, 1, *full] of any dtype but complex; pixels where it is 0 do not count.
        weight_map: None, or float or bool of those shapes, at least 0.
        structure: whether PraNet's weights, made of the target, are a factor too; for sigmoid and one class.
        sigmoid, ignore_index, weighted_ce: as for `map_stats`.

    Returns:
        (target, weight_map, ignore_index) for `map_stats`; the target as it came unless it had to be masked itself.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
    """
    if mask is None and not structure:
        return target, weight_map, ignore_index
    target = check_target(target, first, sigmoid, ignore_index)
    is_dense = target.dim() == first.dim()
    weights = check_weight_map(weight_map, target, first)
    mask = plain(mask)
    if isinstance(mask, Tensor):
        check_dense("mask", mask)  # before it is compared
        if mask.requires_grad:
            raise ValueError("mask: got a tensor that requires a gradient, of which there is none; detach it")
        mask = mask if mask.dtype == torch.bool or mask.is_complex() else mask != 0
    counts = check_weight_map(mask, target, first, "mask")
    if structure:
        ones = _signed(target[:, 0])
        if ignore_index is not None:
            ones = ones.masked_fill(ones == ignore_index, 0)  # an ignored pixel is background to its neighbours
        edges = structure_weights(ones, compute_dtype(first.dtype))
        weights = edges if weights is None else edges.mul_(weights)
    if counts is None:
        return target, weights, ignore_index
    if weights is None:
        weights = counts
    elif weighted_ce:
        weights = torch.where(counts, weights, weights.new_zeros(()))
    if weighted_ce:
        return target, weights, ignore_index
    # Cross-entropy does not see the weights, so it has to learn from the labels which pixels do not count.
    if is_dense and target.shape[1] > 1:
        raise ValueError(
            f"mask: got a mask with weighted_ce=False and a target {tuple(target.shape)} of one value a class, which "
            "has no room for an ignored pixel, expected None; pass weighted_ce=True, or give class numbers"
        )
    target = _signed(target)
    if ignore_index is None:  # a value that no label of the user's has, so that a wrong one is not ignored with it
        ignore_index = -(2**31) if target.is_floating_point() else torch.iinfo(torch.int64).min
    target = target.masked_fill(~(counts.unsqueeze(1) if is_dense else counts), ignore_index)
    return target, None if weight_map is None and not structure else weights, ignore_index


def _signed(labels: Tensor) -> Tensor:
    """Labels of a type that has room for a label that is none and that PyTorch computes with."""
    if labels.is_floating_point():
        return labels.float() if labels.dtype == torch.float16 else labels  # it ends at 65504
    return labels.to(torch.int64)
