"""Two of MONAI's 3D networks, returning their logit maps at native size, finest first.

In training both return a list of L maps [B, C, X/2^i, Y/2^i, Z/2^i], i = 0 .. L-1, which is what
`LoMixLoss(..., order="fine_to_coarse")` takes; in evaluation the finest map alone. Their input is halved L times, so
every axis is a multiple of 2^L.
"""

from __future__ import annotations

import torch
from monai.networks.nets import DynUNet, SegResNetDS
from torch import Tensor, nn

_BLOCKS_DOWN = (1, 2, 2, 4, 4, 4)  # residual blocks at each resolution of SegResNetDS, the finest first
_MOST_CHANNELS = 320  # DynUNet stops doubling there, as nnU-Net does in 3D


class NativeDynUNet(DynUNet):
    """DynUNet whose maps stay at the size they were made.

    MONAI's own forward enlarges every map to full size (nearest neighbour) and stacks them, [B, L, C, X, Y, Z]: L times
    the memory of the finest one, for a loss that interpolates by itself.
    """

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of images [B, in_channels, X, Y, Z]: a list, finest first, in training; else the finest."""
        finest = self.output_block(self.skip_layers(x))
        if not (self.training and self.deep_supervision):
            return finest
        maps = [finest, *self.heads]  # the skip layers left theirs there, the second finest first
        self.heads[:] = [torch.empty(0)] * len(self.heads)  # or the module would hold on to this step's maps
        return maps


def build_network(name: str, scales: int, heads: int, filters: int, num_classes: int) -> nn.Module:
    """Make a network for images [B, 1, X, Y, Z].

    Args:
        name: "segresnet" or "dynunet".
        scales: L, how often the input is halved.
        heads: how many maps it returns in training: L, or 1 for a plain network that returns one tensor.
        filters: channels at full resolution, doubled at every level.
        num_classes: C.

    Raises:
        ValueError: another name, or other heads than 1 or L.
    """
    if heads not in (1, scales):
        raise ValueError(f"heads: got {heads}, expected 1 or scales={scales}")
    if name == "segresnet":
        # Instance norm: batches are small in 3D, and the processes of one job share no statistics.
        return SegResNetDS(
            init_filters=filters,
            out_channels=num_classes,
            norm="instance",
            blocks_down=_BLOCKS_DOWN[: scales + 1],
            dsdepth=heads,
        )
    if name == "dynunet":
        return NativeDynUNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=num_classes,
            kernel_size=[3] * (scales + 1),
            strides=[1] + [2] * scales,
            upsample_kernel_size=[2] * scales,
            filters=[min(filters * 2**level, max(filters, _MOST_CHANNELS)) for level in range(scales + 1)],
            deep_supervision=heads > 1,
            deep_supr_num=max(1, heads - 1),
        )
    raise ValueError(f"name: got {name!r}, expected 'segresnet' or 'dynunet'")
