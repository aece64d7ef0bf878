"""The losses of train_3d.py by name. All take logits finest first, at native size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lomix_fast import LoMixLoss
from lomix_fast.testing.official_style import OfficialStyleLoss, official_style_step


class OfficialStyle(nn.Module):
    """The loss as the authors' code computes it, every map made in full, to compare with; nobody should train with it.

    Args:
        num_classes: C.
        num_scales: L.

    Attributes:
        loss: the `OfficialStyleLoss`. plan: its `MixPlan`.
    """

    def __init__(self, num_classes: int, num_scales: int) -> None:
        super().__init__()
        self.loss = OfficialStyleLoss(num_classes, num_scales)
        self.plan = self.loss.plan

    def forward(
        self, logits: Sequence[Tensor], target: Tensor, mask: Tensor | None = None, weight_map: Tensor | None = None
    ) -> Tensor:
        """The total loss of L maps [B, C, *native], finest first, and labels [B, *full]; a scalar.

        Raises:
            ValueError: a mask or weights, which the authors' loss does not know, or sizes that do not fit.
        """
        if mask is not None or weight_map is not None:
            raise ValueError("mask and weight_map: got one of them, expected neither in the official style")
        return official_style_step(self.loss, list(logits)[::-1], target)

    def param_groups(self, lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """As `LoMixLoss.param_groups`: the group of the loss's parameters for an optimizer."""
        group: dict[str, Any] = {"params": list(self.parameters()), "weight_decay": weight_decay}
        return [group if lr is None else {**group, "lr": lr}]

    def map_weights(self) -> Tensor:
        """The current weight of each map, [M], detached."""
        return nn.functional.softplus(self.loss.alpha.detach())


def heads_of(loss: str, scales: int) -> int:
    """How many maps the network has to make for a loss: L, or 1 where the others would go unused."""
    return 1 if loss == "last-layer" else scales


def build_criterion(loss: str, num_classes: int, scales: int, distributed: bool) -> LoMixLoss | OfficialStyle:
    """Make a loss.

    Args:
        loss: a name out of `options.LOSSES`.
        num_classes: C.
        scales: L.
        distributed: sum the statistics of the batch over all processes, so that its Dice is that of the whole batch;
            the process group has to be there. The official style has each process on its own.
    """
    if loss == "official-style":
        return OfficialStyle(num_classes, scales)
    return LoMixLoss(
        num_classes,
        heads_of(loss, scales),
        supervision=loss.replace("-", "_"),
        order="fine_to_coarse",
        process_group="world" if distributed else None,
    )


def map_weights(criterion: LoMixLoss | OfficialStyle) -> dict[str, float]:
    """The current weight of each map by name; 1 where weights are not learned."""
    return dict(zip(criterion.plan.map_names, criterion.map_weights().tolist(), strict=True))
