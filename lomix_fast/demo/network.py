"""A small U-Net with one head per decoder level, each at its own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTORS = (8, 4, 2, 1)  # heads are at 1/8, 1/4, 1/2 and 1/1 of the image, coarsest first


class SmallUNet(nn.Module):
    """U-Net of five levels whose four decoder levels each predict the classes.

    Args:
        num_classes: C.
        widths: channels of the five levels, finest first, multiples of 4.

    Source: the U-Net of Ronneberger et al. 2015 with group normalisation; a head per level is deep supervision,
    Lee et al. 2015.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = (8, 16, 32, 48, 64)) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            _Block(inside, outside) for inside, outside in zip((1, *widths[:-1]), widths, strict=True)
        )
        rising = list(reversed(widths))  # coarsest first
        self.decoder = nn.ModuleList(_Block(below + skip, skip) for below, skip in pairwise(rising))
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in rising[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of every decoder level.

        Args:
            images: [B, 1, H, W] float32, H and W multiples of 16.

        Returns:
            Four tensors [B, C, H / f, W / f] for f in `FACTORS`, coarsest first.

        Raises:
            ValueError: H or W is not a multiple of 16.
        """
        if images.shape[-2] % 16 or images.shape[-1] % 16:
            raise ValueError(f"images: got {tuple(images.shape)}, expected height and width in multiples of 16")
        skips: list[Tensor] = []
        x = images
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        logits = []
        for block, head, skip in zip(self.decoder, self.heads, reversed(skips[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1))
            logits.append(head(x))
        return logits


class _Block(nn.Sequential):
    """Two 3x3 convolutions, each with group normalisation and ReLU; [B, inside, H, W] to [B, outside, H, W]."""

    def __init__(self, inside: int, outside: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inside, outside):
            layers += [
                nn.Conv2d(channels, outside, 3, padding=1, bias=False),
                nn.GroupNorm(4, outside),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)
