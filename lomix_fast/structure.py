"""PraNet's weights of pixels: those near an edge of the mask count more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 31
FACTOR = 5.0


def structure_weights(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W = 1 + 5 |mean of m over a window of 31 - m|, with zeros beyond the border counted in the mean.

    The sum over a box is taken axis by axis, each of sums over 1, 2, 4, 8 and 16 neighbours: little more work for a
    large window than for a small one. Not as the difference of two running sums, which torch refuses on CUDA where it
    has to be deterministic, and which loses digits. Sums of hard masks are whole numbers, and exact.

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
            # Zeros on both sides: a window past the border sums what there is of it.
            some = F.pad(sums, [0, 0] * (mask.dim() - 1 - axis) + [half, half])  # sums over `width` neighbours
            sums, start, width = torch.zeros_like(values), 0, 1
            while True:
                sums += some.narrow(axis, start, size)
                start += width
                if start == WINDOW:
                    break
                places = some.shape[axis] - width
                some = some.narrow(axis, 0, places) + some.narrow(axis, width, places)
                width *= 2
        mean = sums.div_(WINDOW ** (mask.dim() - 1))
        return mean.sub_(values).abs_().mul_(FACTOR).add_(1.0)
