"""PraNet's weights of pixels: those near an edge of the mask count more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 31
FACTOR = 5.0


def structure_weights(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W = 1 + 5 |mean of m over a window of 31 - m|, with zeros beyond the border counted in the mean.

    The sum over a box is taken axis by axis, each as the difference of two running sums: no more work for a large
    window than for a small one. Sums of hard masks are whole numbers, and exact.

    Args:
        mask: m [B, *full], 1 to 3 spatial axes, from 0 to 1, hard or soft, any dtype but complex.
        dtype: of the computation and of the result.

    Returns:
        [B, *full], from 1 to 6, not differentiable.

    Source: Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI 2020, the structure
    loss of the released code.
    """
    with torch.no_grad():
        sums = values = mask.to(dtype)
        for axis in range(1, mask.dim()):
            half, size = WINDOW // 2, mask.shape[axis]
            # Zeros before and the last sum again behind: a window past the border sums what there is of it.
            before = [0, 0] * (mask.dim() - 1 - axis) + [half + 1, half]
            running = F.pad(sums, before).cumsum(axis)
            sums = running.narrow(axis, WINDOW, size) - running.narrow(axis, 0, size)
        mean = sums.div_(WINDOW ** (mask.dim() - 1))
        return mean.sub_(values).abs_().mul_(FACTOR).add_(1.0)
