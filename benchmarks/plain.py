"""The loss as a careful person writes it in plain PyTorch: the honest opponent, eager and under torch.compile.

Nothing is wasted that can be spared without giving up autograd: labels become one-hot once for all maps, CE and Dice
of a map share one log-softmax, a 1x1 convolution is a matrix product without copies of its input, and the host never
waits. What remains is what autograd has to keep: two full-size maps for every supervised map, and then some.
`lomix_fast.reference` is no opponent: written to be read, it makes a one-hot tensor for every map, among others, and
takes about one and a half times as long and twice the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lomix_fast import MixPlan

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
_SMOOTH = 1e-5


def plain_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    plan: MixPlan,
    row_of_pair: Sequence[int],
    alpha: Tensor,
    cat_weight: Tensor | None,
    cat_bias: Tensor | None,
    awf_weight: Tensor | None,
    awf_bias: Tensor | None,
) -> Tensor:
    """The total loss, a scalar: sum over maps of softplus(alpha_m) (0.3 CE_m + 0.7 Dice_m).

    Args:
        logits: L tensors [B, C, *native], coarsest first, float32 or wider.
        target: class numbers [B, *full], int64.
        plan: the maps and their order.
        row_of_pair: for each of the K pairs its row of `awf_weight`, from `lomix_fast.mixing.awf_rows`.
        alpha: [M].
        cat_weight, cat_bias: W [K, C, C] and b [S, C].
        awf_weight, awf_bias: [rows, C] and [rows].
    """
    full = tuple(target.shape[1:])
    scales = [_upsample(z, full).flatten(2) for z in logits]  # each [B, C, N]
    label = target.flatten(1).unsqueeze(1)  # [B, 1, N]
    one_hot = torch.zeros_like(scales[0]).scatter_(1, label, 1.0)  # [B, C, N]
    label_sums = one_hot.sum((0, 2))  # [C]
    weights = F.softplus(alpha)
    total = weights.new_zeros(())
    for m, spec in enumerate(plan.maps):
        members = [scales[i] for i in spec.members]
        pairs = range(spec.first_pair, spec.first_pair + len(members))
        if spec.operator in ("orig", "add"):
            mixed = sum(members[1:], start=members[0])
        elif spec.operator == "mul":
            mixed = members[0]
            for member in members[1:]:
                mixed = mixed * member
        elif spec.operator == "cat":
            assert cat_weight is not None and cat_bias is not None
            mixed = cat_bias[spec.subset].view(1, -1, 1)
            for pair, member in zip(pairs, members, strict=True):
                mixed = mixed + _project(cat_weight[pair], member)
        else:
            assert awf_weight is not None and awf_bias is not None
            rows = [row_of_pair[pair] for pair in pairs]
            scores = [_project(awf_weight[r : r + 1], p) + awf_bias[r] for r, p in zip(rows, members, strict=True)]
            attention = torch.cat(scores, dim=1).softmax(1)  # [B, |S|, N]
            mixed = attention[:, :1] * members[0]
            for j, member in enumerate(members[1:], start=1):
                mixed = mixed + attention[:, j : j + 1] * member
        total = total + weights[m] * _map_loss(mixed, label, one_hot, label_sums)
    return total


def _upsample(logits: Tensor, full: tuple[int, ...]) -> Tensor:
    if tuple(logits.shape[2:]) == full:
        return logits
    return F.interpolate(logits, size=full, mode=_INTERPOLATION[len(full)], align_corners=False)


def _project(weight: Tensor, scale: Tensor) -> Tensor:
    """A 1x1 convolution, [O, C] on [B, C, N] -> [B, O, N]; bmm, because weight @ scale copies the scale transposed."""
    return torch.bmm(weight.expand(scale.shape[0], -1, -1), scale)


def _map_loss(mixed: Tensor, label: Tensor, one_hot: Tensor, label_sums: Tensor) -> Tensor:
    """0.3 CE + 0.7 Dice of one map [B, C, N]."""
    log_s = mixed.log_softmax(1)
    log_s_y = log_s.gather(1, label)  # [B, 1, N]
    ce = -log_s_y.mean()
    intersection = torch.bmm(one_hot, log_s_y.exp().transpose(1, 2)).sum((0, 2))  # [C], no map-sized product
    denominator = log_s.exp().square().sum((0, 2))  # [C]
    dice = 1 - (2 * intersection + _SMOOTH) / (denominator + label_sums + _SMOOTH)
    return 0.3 * ce + 0.7 * dice.mean()
