"""SPEC of LoMix written out once more in torch, as plainly as possible: autograd gives literal gradients.

literal.py beside this file does the same pixel by pixel in numpy, without gradients. Nothing here is shared
with the package: subsets, map order, interpolation, softmax, CE and Dice are all spelt out. For float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor


def literal_map_losses(
    logits: Sequence[Tensor],
    target: Tensor,
    operators: Sequence[str],
    *,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
    lambda_ce: float = 0.3,
    lambda_dice: float = 0.7,
) -> dict[str, Tensor]:
    """Loss of every map, each a scalar, by name: "orig_0", .., then "add_0_1", .. operator by operator.

    Args:
        logits: L tensors [B, C, *native], coarsest first.
        target: int64 class numbers [B, *full].
        operators: out of "add", "mul", "cat", "awf", "sub", "avg", "max".
        cat_weight: [K, C, C], one matrix (out, in) for each member of each subset, subset by subset.
        cat_bias: [S, C], one vector for each subset.
        awf_weight: [n, C], one row for each (subset size, position in the subset), sizes from 2.
        awf_bias: [n].
        lambda_ce, lambda_dice: weights of the two terms.
    """
    num_scales = len(logits)
    scales = [literal_upsample(z, tuple(target.shape[1:])) for z in logits]
    subsets = [s for size in range(2, num_scales + 1) for s in combinations(range(num_scales), size)]
    maps = {f"orig_{i}": p for i, p in enumerate(scales)}
    for operator in operators:
        pair = 0
        for number, subset in enumerate(subsets):
            members = [scales[i] for i in subset]
            first_row = sum(range(2, len(subset)))
            if operator == "add":
                mixed = sum(members[1:], start=members[0])
            elif operator == "mul":
                mixed = torch.stack(members).prod(0)
            elif operator == "sub":
                mixed = members[0]
                for p in members[1:]:
                    mixed = mixed - p
            elif operator == "avg":
                mixed = sum(members[1:], start=members[0]) / len(members)
            elif operator == "max":
                mixed = torch.stack(members).max(0).values
            elif operator == "cat":
                assert cat_weight is not None and cat_bias is not None
                mixed = per_class(cat_bias[number], members[0])
                for position, p in enumerate(members):
                    matrix = cat_weight[pair + position]
                    mixed = mixed + torch.stack([(per_class(row, p) * p).sum(1) for row in matrix], dim=1)
            else:
                assert awf_weight is not None and awf_bias is not None
                scores = [
                    (per_class(awf_weight[first_row + position], p) * p).sum(1) + awf_bias[first_row + position]
                    for position, p in enumerate(members)
                ]
                largest = torch.stack(scores).amax(0).detach()
                heat = [(score - largest).exp() for score in scores]
                norm = sum(heat[1:], start=heat[0])
                parts = [(h / norm).unsqueeze(1) * p for h, p in zip(heat, members, strict=True)]
                mixed = sum(parts[1:], start=parts[0])
            pair += len(subset)
            maps["_".join([operator, *map(str, subset)])] = mixed
    return {name: literal_loss(p, target, lambda_ce, lambda_dice) for name, p in maps.items()}


def literal_loss(logits: Tensor, target: Tensor, lambda_ce: float = 0.3, lambda_dice: float = 0.7) -> Tensor:
    """lambda_ce * CE + lambda_dice * Dice of one map [B, C, *full] and class numbers [B, *full], a scalar."""
    shifted = logits - logits.detach().amax(1, keepdim=True)
    s = shifted.exp() / shifted.exp().sum(1, keepdim=True)
    log_s = shifted - shifted.exp().sum(1, keepdim=True).log()
    ce, dice = logits.new_zeros(()), logits.new_zeros(())
    for c in range(logits.shape[1]):
        y = (target == c).to(logits.dtype)
        ce = ce - (y * log_s[:, c]).sum() / target.numel()
        overlap, squares = (s[:, c] * y).sum(), (s[:, c] ** 2).sum()
        dice = dice + (1 - (2 * overlap + 1e-5) / (squares + y.sum() + 1e-5)) / logits.shape[1]
    return lambda_ce * ce + lambda_dice * dice


def literal_upsample(logits: Tensor, full: tuple[int, ...]) -> Tensor:
    """Linear interpolation along each spatial axis, pixel centres at i + 1/2 (align_corners=False)."""
    for axis, size in enumerate(full, start=2):
        native = logits.shape[axis]
        if native == size:
            continue
        matrix = logits.new_zeros(size, native)
        for i in range(size):
            x = max((i + 0.5) * native / size - 0.5, 0.0)
            low = min(int(x), native - 1)
            high = min(low + 1, native - 1)
            matrix[i, low] += 1 - (x - low)
            matrix[i, high] += x - low
        logits = torch.tensordot(logits, matrix, dims=([axis], [1])).movedim(-1, axis)
    return logits


def per_class(vector: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ..] that broadcasts over `like` [B, C, *full]."""
    return vector.reshape(1, -1, *[1] * (like.dim() - 2))
