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
    sigmoid: bool = False,
    weight: Tensor | None = None,
    jaccard: bool = False,
    tversky: tuple[float, float] | None = None,
    absent_classes: str = "include",
    ce_per_sample: bool = False,
) -> Tensor:
    """Loss of each map: lambda_ce * CE + lambda_dice * Dice.

    CE is the mean over all counted pixels of the batch (weighted where the statistics are), under `sigmoid` over pixels
    and classes. Dice is the mean over classes (and over samples when `batch` is false) of

        1 - (2 I + smooth_nr) / (P + G + smooth_dr)                     by default,
        1 - (2 I + smooth_nr) / (2 (P + G - I) + smooth_dr)             with `jaccard`,
        1 - (I + smooth_nr) / (I + a (P - I) + b (G - I) + smooth_dr)   with `tversky` = (a, b),

    where P and G hold squares or not, as the plan that made the statistics says.

    A sample (with `batch`, a batch) of which no pixel counts has loss 0 and a gradient of exactly 0, each term by what
    counts for it; it still counts in the mean over samples, as a sample without loss. So does an empty batch. That is
    decided by arithmetic, without a look at the values, and a NaN or an infinity in the statistics stays one.

    Args:
        stats: [B, M, 1 + 2C] from `lomix_fast.map_stats`.
        target_stats: [B, 1 + C] from the same call.
        lambda_ce, lambda_dice: weights of the two terms.
        smooth_nr, smooth_dr: added to numerator and denominator of Dice.
        include_background: whether class 0 enters Dice; it always enters CE.
        batch: sum over the batch before the ratio (the authors' code) or not.
        sigmoid: whether the statistics are those of a plan with `sigmoid`, so that CE is a sum over classes.
        weight: None, or factors of each class's Dice before the mean: [C], [C - 1] without background, or a scalar.
        jaccard, tversky: another ratio in place of Dice; at most one of the two.
        absent_classes: "include", or "exclude": classes whose target sums to 0 (in the sample, or in the batch with
            `batch`) leave the mean over classes; with none present it is 0.
        ce_per_sample: normalise CE in each sample and take the mean over samples.

    Returns:
        [M], in the dtype of `stats`.

    Source: paper section on supervision; monai.losses.DiceCELoss and TverskyLoss; `ce_per_sample` as in the structure
    loss of PraNet.
    """
    if stats.shape[0] == 0:
        return stats.sum((0, 2))  # zeros that autograd can go through
    num_classes = target_stats.shape[1] - 1
    ce, intersection, prediction = stats.split([1, num_classes, num_classes], dim=2)  # [B, M, 1], [B, M, C] twice
    count, labels = target_stats.split([1, num_classes], dim=1)  # [B, 1], [B, C]
    ce_loss = _cross_entropy(ce.squeeze(2), count, ce_per_sample) / (num_classes if sigmoid else 1)  # [M]
    if batch:
        intersection, prediction, labels = (x.sum(0, keepdim=True) for x in (intersection, prediction, labels))
    # By Dice's own sums over all classes, as pixels may count for CE alone (`weighted_ce`) or, under class weights of
    # 0, for Dice alone. P is above 0 wherever a pixel counts, unless every sigmoid underflows, and then its gradient is
    # 0 anyway. Not `> 0`, under which a NaN would pass for nothing.
    is_counted = (prediction.detach().sum(2) + labels.sum(1, keepdim=True) != 0).unsqueeze(2)  # [B or 1, M, 1]
    first = 0 if include_background else 1
    labels = labels[:, None, first:]  # [B or 1, 1, C]
    intersection, prediction = intersection[:, :, first:], prediction[:, :, first:]  # [B or 1, M, C]
    if tversky is not None:
        alpha, beta = tversky
        numerator = intersection + smooth_nr
        denominator = intersection + alpha * (prediction - intersection) + beta * (labels - intersection) + smooth_dr
    else:
        numerator = 2 * intersection + smooth_nr
        union = 2 * (prediction + labels - intersection) if jaccard else prediction + labels
        denominator = union + smooth_dr
    # The factor rather than a second torch.where, which would hide a NaN; the first keeps 0 / 0 out of both passes.
    dice = (1 - numerator / torch.where(is_counted, denominator, 1.0)) * is_counted
    if weight is not None:
        dice = dice * weight.to(dice.dtype)
    if absent_classes == "exclude":
        is_present = labels > 0
        dice_loss = (dice * is_present).sum(2) / is_present.sum(2).clamp(min=1)  # [B or 1, M]
    else:
        dice_loss = dice.mean(2)
    return lambda_ce * ce_loss + lambda_dice * dice_loss.mean(0)


def _cross_entropy(ce: Tensor, count: Tensor, per_sample: bool) -> Tensor:
    """Sums [B, M] and what they are divided by [B, 1] -> [M]; 0 where nothing counts."""
    if not per_sample:
        ce, count = ce.sum(0, keepdim=True), count.sum(0, keepdim=True)
    is_counted = count > 0
    return (ce / torch.where(is_counted, count, 1.0) * is_counted).mean(0)


def counts_any(target_stats: Tensor) -> Tensor:
    """Whether any pixel of the batch counts: [B, 1 + C] -> a bool scalar on the same device."""
    return target_stats.sum() > 0


def total_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of w_m * l_m over the maps: [M], [M] -> scalar. No division by M (SPEC, as the paper)."""
    return torch.sum(weights.to(losses.dtype) * losses)
