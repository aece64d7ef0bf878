"""`lomix_loss`: the loss as a function of logits, target, weights and parameters, without a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .checks import check_dense, check_logits, check_order, split_stack
from .names import suggests_options
from .ops import map_stats
from .options import (
    ORDER,
    ce_class_weights,
    check_recipe,
    check_stacked_dim,
    dice_class_weights,
    is_weighted_mean,
    without_common_factor,
)
from .pixels import weigh_pixels
from .plan import MixPlan
from .recipe import map_losses, total_loss


@suggests_options
def lomix_loss(
    logits: Sequence[Tensor] | Tensor,
    target: Tensor,
    weights: Tensor,
    plan: MixPlan,
    *,
    mask: Tensor | None = None,
    weight_map: Tensor | None = None,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
    lambda_ce: float = 0.3,
    lambda_dice: float = 0.7,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    batch: bool = True,
    jaccard: bool = False,
    tversky: tuple[float, float] | None = None,
    absent_classes: str = "include",
    weight: Sequence[float] | Tensor | float | None = None,
    ce_weight: Sequence[float] | Tensor | None = None,
    ce_per_sample: bool = False,
    weighted_ce: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    structure: bool = False,
    stacked_dim: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """The LoMix loss as a function: sum over the maps of weights[m] * (lambda_ce * CE_m + lambda_dice * Dice_m).

    Args:
        logits: L tensors [B, C, *native], coarsest first, in a list or with `stacked_dim` in one tensor.
        target: labels [B, *full] or [B, 1, *full], or one value a class [B, C, *full], see `map_stats`.
        weights: [M], the final (for example softplus-ed) weight of each map, in `plan.map_names` order.
        plan: which maps; `MixPlan.create(L, ..., squared=..., sigmoid=..., bounded=..., subsets=...)` also says whether
            Dice squares the probabilities, whether they are sigmoids, and how products are made.
        mask, weight_map: of the call, see `LoMixLoss.forward`.
        cat_weight, cat_bias, awf_weight, awf_bias: parameters of the mixes, see `map_stats`.
        lambda_ce, lambda_dice, smooth_nr, smooth_dr, include_background, batch, jaccard, tversky, absent_classes,
            weight, ce_weight, ce_per_sample, weighted_ce, ignore_index, label_smoothing, structure: see `LoMixLoss`.
            Class weights that come as tensors must be on the device of the logits, and their values are not looked at.
            Sequences and arrays of C numbers are written there at every call by C small kernels, without a wait and so
            within a CUDA graph too; a tensor made once saves those.
        stacked_dim: 1 for logits [B, L, C, *native], 0 for [L, B, C, *native], None for a list.
        impl: backend, see `available_backends`.

    Returns:
        Scalar, float32 (float64 for float64 logits), differentiable in logits, weights and parameters.

    Raises:
        TypeError, ValueError, RuntimeError: as `map_stats` and `LoMixLoss`; TypeError or ValueError if `weights` is not
            a float [M]; ValueError for sizes that shrink along the list.

    Source: Rahman and Marculescu, NeurIPS 2025, total loss; no division by M.
    """
    if not isinstance(plan, MixPlan):
        raise TypeError(
            f"plan: got {type(plan).__name__}, expected a MixPlan; make one with MixPlan.create(num_scales)"
        )
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights: got {getattr(weights, 'dtype', type(weights).__name__)}, expected a float tensor")
    check_dense("weights", weights)
    if tuple(weights.shape) != (plan.num_maps,):
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected [{plan.num_maps}], one weight per map")
    check_stacked_dim(stacked_dim)
    maps = check_logits(split_stack(logits, stacked_dim))
    check_order([tuple(z.shape[2:]) for z in maps], ORDER[0], "pass them coarsest first")
    if weights.device != maps[0].device:
        raise ValueError(f"weights: got device {weights.device}, expected {maps[0].device} as the logits have")
    num_classes = maps[0].shape[1]
    recipe: dict[str, Any] = {
        "lambda_ce": lambda_ce,
        "lambda_dice": lambda_dice,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
        "include_background": include_background,
        "batch": batch,
        "jaccard": jaccard,
        "tversky": tversky,
        "absent_classes": absent_classes,
        "ce_per_sample": ce_per_sample,
        "sigmoid": plan.sigmoid,
    }
    check_recipe(
        num_classes,
        squared_pred=plan.squared,
        structure=structure,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        weighted_ce=weighted_ce,
        **recipe,
    )
    of_ce = ce_class_weights(ce_weight, num_classes, maps[0].device)
    if of_ce is not None and is_weighted_mean(target, maps[0].dim(), plan.sigmoid):
        of_ce = without_common_factor(of_ce)
    of_dice = dice_class_weights(weight, num_classes, include_background, maps[0].device)
    target, weight_map, ignore_index = weigh_pixels(
        target,
        maps[0],
        mask=mask,
        weight_map=weight_map,
        structure=structure,
        sigmoid=plan.sigmoid,
        ignore_index=ignore_index,
        weighted_ce=weighted_ce,
    )
    stats, target_stats = map_stats(
        maps,
        target,
        plan,
        weight_map=weight_map,
        ce_weight=of_ce,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        weighted_ce=weighted_ce,
        cat_weight=cat_weight,
        cat_bias=cat_bias,
        awf_weight=awf_weight,
        awf_bias=awf_bias,
        impl=impl,
    )
    return total_loss(map_losses(stats, target_stats, weight=of_dice, **recipe), weights)
