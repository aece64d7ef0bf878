"""How the losses of the maps become one number: four weightings over one learned vector alpha [M]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .recipe import total_loss

WEIGHTING = ("softplus", "fixed", "normalized", "uncertainty")

# Below it softplus(a) is exp(a) to the last bit of float64, and its logarithm a; float32 has no softplus(-104).
_LINEAR = -36.0


def map_weights(alpha: Tensor, weighting: str, active: Tensor | None = None) -> Tensor:
    """Weight of each map, differentiable in alpha.

    "softplus" and "uncertainty": softplus(alpha). "normalized": M softplus(alpha) / sum of softplus(alpha), so that
    the weights always add up to M.

    Args:
        alpha: [M].
        weighting: one of those three; "fixed" has no alpha.
        active: numbers of the maps wanted, int64, or None for all. The others get a gradient of exactly zero, though
            their share of the total of "normalized" stays theirs, so that no weight jumps when a map is dropped.

    Returns:
        [M], or [len(active)], float32 (float64 for float64 alpha).
    """
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))  # half types round weights by up to 0.4 %
    if weighting != "normalized":
        positive = F.softplus(alpha)
        return positive if active is None else positive.index_select(0, active)
    # Shares by way of logarithms, as every softplus may be 0 in floating point.
    logs = log_softplus(alpha)
    if active is None:
        return alpha.numel() * logs.softmax(0)
    # The value is that among all maps, the gradient that among the wanted ones.
    logs = logs.detach().index_copy(0, active, logs.index_select(0, active))
    return alpha.numel() * logs.softmax(0).index_select(0, active)


def weighted_total(
    losses: Tensor, alpha: Tensor, weighting: str, is_counted: Tensor, active: Tensor | None = None
) -> Tensor:
    """The total loss, a scalar: sum of w_m l_m, and minus sum of log w_m with "uncertainty".

    With "uncertainty" a map of constant loss l has its minimum at w = 1 / l. Where no pixel counts the logarithms are
    left out too: such a batch has nothing to say about the weights.

    Args:
        losses: [M], or those of the active maps.
        alpha: [M].
        weighting: "softplus", "normalized" or "uncertainty".
        is_counted: bool scalar, whether any pixel counts.
        active: numbers of the active maps, or None for all.

    Source: paper for "softplus"; Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses",
    CVPR 2018, for "uncertainty", with w = softplus(alpha) in place of their precision.
    """
    total = total_loss(losses, map_weights(alpha, weighting, active))
    if weighting != "uncertainty":
        return total
    kept = alpha if active is None else alpha.index_select(0, active)
    kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
    return total - (log_softplus(kept).sum() * is_counted).to(total.dtype)


def log_softplus(alpha: Tensor) -> Tensor:
    """log(softplus(alpha)) of any shape, finite with a finite gradient for every finite alpha of any float dtype."""
    wide = alpha.to(torch.promote_types(alpha.dtype, torch.float32))  # softplus(-18) is 0 in float16
    return torch.where(wide < _LINEAR, wide, F.softplus(wide.clamp(min=_LINEAR)).log()).to(alpha.dtype)
