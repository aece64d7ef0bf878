"""From the table of statistics to losses: ordinary PyTorch on [B, M, 1 + 2C], differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def map_losses(
    stats: Tensor,
    target_stats: Tensor,
    *,
    lambda_ce: float = 0.3,
    lambda_dice: float = 0.7,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    batch: bool = True,
) -> Tensor:
    """Loss of each map: lambda_ce * CE + lambda_dice * Dice.

    CE is the mean over all pixels of the batch of -log s_y. Dice is the mean over classes (and over samples when
    `batch` is false) of 1 - (2 I_c + smooth_nr) / (Q_c + Y_c + smooth_dr); Q_c holds s^2 or s as the plan that made the
    statistics says (labels are 0 or 1, so their square is themselves). An empty batch has loss 0.

    Args:
        stats: [B, M, 1 + 2C] from `lomix_fast.map_stats`.
        target_stats: [B, 1 + C] from the same call.
        lambda_ce, lambda_dice: weights of the two terms.
        smooth_nr, smooth_dr: added to numerator and denominator of Dice.
        include_background: whether class 0 enters Dice; it always enters CE.
        batch: sum numerator and denominator over the batch before the ratio (the authors' code) or not.

    Returns:
        [M], in the dtype of `stats`.

    Source: paper section on supervision; names and conventions of monai.losses.DiceCELoss.
    """
    if stats.shape[0] == 0:
        return stats.sum((0, 2))  # zeros that autograd can go through
    num_classes = target_stats.shape[1] - 1
    ce, intersection, denominator = stats.split([1, num_classes, num_classes], dim=2)  # [B, M, 1], [B, M, C] twice
    ce_loss = ce.sum((0, 2)) / target_stats[:, 0].sum()  # [M]
    labels = target_stats[:, None, 1:]  # [B, 1, C]
    if batch:
        intersection, denominator, labels = (x.sum(0, keepdim=True) for x in (intersection, denominator, labels))
    first = 0 if include_background else 1
    score = (2 * intersection + smooth_nr) / (denominator + labels + smooth_dr)  # [B or 1, M, C]
    dice = (1 - score)[:, :, first:].mean(2)  # [B or 1, M]
    return lambda_ce * ce_loss + lambda_dice * dice.mean(0)


def total_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of w_m * l_m over the maps: [M], [M] -> scalar. No division by M (SPEC, as the paper)."""
    return torch.sum(weights.to(losses.dtype) * losses)
