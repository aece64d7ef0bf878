"""The three losses LoMix is compared with, as a careful person writes them in plain PyTorch under autograd.

Each map costs one log-softmax, from which both terms are taken: CE by `nll_loss`, Dice by its exponential. Labels never
become one-hot: a pixel's own probability is gathered and added to its class's sum. That is the leanest form in which
autograd keeps only two full-size arrays a map; with `cross_entropy`, `softmax` and `one_hot` apart it keeps three. A
map that nobody needs any more is dropped before the next one is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
_SMOOTH = 1e-5


def last_layer(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """0.3 CE + 0.7 Dice of the finest scale alone, a scalar.

    Args:
        logits: L tensors [B, C, *native], coarsest first; only the last is read.
        target: class numbers [B, *full], int64.
    """
    return ce_and_dice(upsampled(logits[-1], target), target, pixels_of_class(target, logits[-1]))


def deep_supervision(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Sum over the scales of 0.3 CE + 0.7 Dice, weight 1 each; arguments as for `last_layer`."""
    pixels = pixels_of_class(target, logits[-1])
    return torch.stack([ce_and_dice(upsampled(z, target), target, pixels) for z in logits]).sum()


def mutation(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """MERIT's loss: sum over all 2^L - 1 non-empty subsets of 0.3 CE + 0.7 Dice of the sum of their scales.

    Arguments as for `last_layer`; weight 1 each.
    """
    scales = [upsampled(z, target) for z in logits]  # each [B, C, *full]
    pixels = pixels_of_class(target, logits[-1])
    total = scales[0].new_zeros(())
    for size in range(1, len(scales) + 1):
        for members in combinations(scales, size):
            total = total + ce_and_dice(sum(members[1:], start=members[0]), target, pixels)
    return total


def upsampled(logits: Tensor, target: Tensor) -> Tensor:
    """Logits [B, C, *native] at the size of the target [B, *full], linear in every axis, align_corners=False."""
    full = tuple(target.shape[1:])
    if tuple(logits.shape[2:]) == full:
        return logits
    return F.interpolate(logits, size=full, mode=_INTERPOLATION[len(full)], align_corners=False)


def pixels_of_class(target: Tensor, like: Tensor) -> Tensor:
    """How many labels of a target [B, *full] each class has, [C], in the dtype of logits `like` [B, C, ...]."""
    labels, none = target.flatten(), like.new_zeros(like.shape[1])
    return none.index_add(0, labels, none.new_ones(()).expand(labels.shape[0]))


def ce_and_dice(logits: Tensor, target: Tensor, pixels: Tensor) -> Tensor:
    """0.3 CE + 0.7 Dice of one map, a scalar.

    CE is the mean over pixels. Dice is the mean over classes of 1 - (2 I + 1e-5) / (Q + Y + 1e-5) with sums over the
    whole batch: I of the probability of the right class, Q of squared probabilities, Y of pixels of the class.

    Args:
        logits: [B, C, *full].
        target: class numbers [B, *full], int64.
        pixels: Y [C], of the whole batch.
    """
    log_s = logits.log_softmax(1)
    ce = F.nll_loss(log_s, target)
    s = log_s.exp()
    s_of_label = s.gather(1, target.unsqueeze(1)).flatten()  # [B N]
    intersection = logits.new_zeros(logits.shape[1]).index_add(0, target.flatten(), s_of_label)
    squares = s.square().sum([axis for axis in range(s.dim()) if axis != 1])
    dice = 1 - (2 * intersection + _SMOOTH) / (squares + pixels + _SMOOTH)
    return 0.3 * ce + 0.7 * dice.mean()
