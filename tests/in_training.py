"""A small network with three scales, and the ways of using `LoMixLoss` that tests of training and tracing take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomix_fast import LoMixLoss


class SmallUNet(nn.Module):
    """U-shaped, with maps at 1/8, 1/4 and 1/2 of the image, coarsest first."""

    def __init__(self, classes: int = 3, axes: int = 2, channels: int = 3) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.down = nn.ModuleList([conv(1 if i == 0 else channels, channels, 3, 2, 1) for i in range(3)])
        self.up = nn.ModuleList([conv(channels, channels, 3, 1, 1) for _ in range(2)])
        self.heads = nn.ModuleList([conv(channels, classes, 1) for _ in range(3)])

    def forward(self, image: Tensor) -> list[Tensor]:
        skips = [image]
        for layer in self.down:
            skips.append(F.relu(layer(skips[-1])))
        x = skips.pop()
        maps = [self.heads[0](x)]
        for layer, head in zip(self.up, self.heads[1:], strict=True):
            skip = skips.pop()
            x = F.relu(layer(F.interpolate(x, size=skip.shape[2:]) + skip))
            maps.append(head(x))
        return maps


class Joined(nn.Module):
    """Network and criterion as one module, image and target in, loss out."""

    def __init__(self, network: nn.Module, criterion: LoMixLoss) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, image: Tensor, target: Tensor, **others: Tensor) -> Tensor:
        maps = self.network(image)
        return self.criterion(maps if self.criterion.order == "coarse_to_fine" else maps[::-1], target, **others)


@dataclass(frozen=True)
class Use:
    """One way of using the loss: options of the criterion, and what it is called with."""

    options: dict[str, Any] = field(default_factory=dict)
    classes: int = 3
    target: str = "labels"  # or "regions" (bool), "shares" (float)
    mask: bool = False
    weight_map: bool = False

    def criterion(self, impl: str = "auto") -> LoMixLoss:
        """Three scales; parameters that are not all alike."""
        criterion = LoMixLoss(self.classes, 3, impl=impl, **self.options)
        with torch.no_grad():
            for parameter in criterion.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        criterion.update_pruning()
        return criterion

    def call(self, batch: int, full: tuple[int, ...]) -> dict[str, Tensor]:
        """What a call takes besides the logits."""
        if self.target == "labels":
            target = torch.randint(self.classes, (batch, *full))
            if "ignore_index" in self.options:
                target[torch.rand(target.shape) < 0.2] = self.options["ignore_index"]
        else:
            target = torch.rand(batch, self.classes, *full)
            target = target > 0.5 if self.target == "regions" else target / target.sum(1, keepdim=True)
        found = {"target": target}
        if self.mask:
            found["mask"] = torch.rand(batch, *full) > 0.3
        if self.weight_map:
            found["weight_map"] = torch.rand(batch, 1, *full)
        return found

    def logits(
        self, batch: int, sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Leaves that ask for a gradient, in the order of the criterion; sizes are coarsest first."""
        maps = [torch.randn(batch, self.classes, *n).to(dtype).requires_grad_() for n in sizes]
        return maps[::-1] if self.options.get("order") == "fine_to_coarse" else maps


USES = {
    "as published": Use(),
    "fixed": Use({"weighting": "fixed", "order": "fine_to_coarse"}),
    "normalized": Use({"weighting": "normalized", "awf_sharing": "scale"}),
    "uncertainty": Use({"weighting": "uncertainty", "awf_sharing": "subset"}),
    "by sample": Use({"batch": False, "absent_classes": "exclude", "ce_per_sample": True}),
    "ignored labels": Use({"ignore_index": 255, "order": "fine_to_coarse"}),
    "classes weighed": Use({"ce_weight": (1.0, 2.0, 0.5), "weight": (1.0, 0.0, 3.0), "label_smoothing": 0.1}),
    "pixels weighed": Use(weight_map=True, mask=True),
    "pixels weighed for Dice": Use({"weighted_ce": False, "batch": False}, weight_map=True, mask=True),
    "regions": Use({"sigmoid": True, "ce_weight": (1.0, 2.0, 0.5)}, target="regions", mask=True),
    "shares": Use({"label_smoothing": 0.2, "jaccard": True}, target="shares", weight_map=True),
    "structure": Use({"sigmoid": True, "structure": True, "ignore_index": 255}, classes=1),
    "tversky": Use({"tversky": (0.3, 0.7), "squared_pred": False, "include_background": False}),
    "other mixes": Use({"operators": ("sub", "avg", "max", "mul"), "mul": "bounded", "subsets": "pairs"}),
    "mutation": Use({"supervision": "mutation"}),
    "finest alone": Use({"supervision": "last_layer"}),
    "pruned": Use({"prune_below": 0.693, "prune_every": None, "weighting": "uncertainty"}),
    "pruned shares of the total": Use({"prune_below": 1.0, "prune_every": None, "weighting": "normalized"}),
}  # fmt: skip
