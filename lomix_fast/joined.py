"""Network and loss as one module, for wrappers that look after the parameters of one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checkpoint import CheckedWhole
from .constants import Configured


class NetworkWithLoss(CheckedWhole):
    """A network and its criterion as one module; see `with_loss`.

    Attributes:
        network: what makes logits of images; save, export and deploy this one alone.
        criterion: the loss.
    """

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        for name, module in (("network", network), ("criterion", criterion)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: got {type(module).__name__}, expected a torch.nn.Module")
        if isinstance(network, Configured):
            raise TypeError(
                f"network: got {type(network).__name__}, which is a loss, expected what makes the logits; are the two "
                "swapped?"
            )
        self.network, self.criterion = network, criterion

    def _check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str, strict: bool, assign: bool) -> None:
        check = getattr(self.criterion, "_check_checkpoint", None)
        if check is not None:
            check(state_dict, f"{prefix}criterion.", strict, assign)

    def forward(
        self, images: Any, target: Any = None, mask: Tensor | None = None, weight_map: Tensor | None = None
    ) -> Any:
        """The loss of a batch, or without a target what the network makes of it.

        Args:
            images: what the network takes.
            target, mask, weight_map: as `LoMixLoss.forward`; None for a prediction.

        Raises:
            ValueError: a mask or weight map without a target.
        """
        if target is None and (mask is not None or weight_map is not None):
            raise ValueError("target: got None with a mask or weight_map, expected the labels they belong to")
        output = self.network(images)
        if target is not None:
            options = {"mask": mask, "weight_map": weight_map}
            return self.criterion(output, target, **{name: v for name, v in options.items() if v is not None})
        return output


def with_loss(network: nn.Module, criterion: nn.Module) -> NetworkWithLoss:
    """Join a network and its loss, so that wrapping one module takes care of the parameters of both.

        module = DistributedDataParallel(with_loss(network, criterion))
        loss = module(images, target)

    DistributedDataParallel and FSDP then broadcast, average and shard the parameters of the loss as they do those of
    the network, torch.compile sees both, and `state_dict` holds both, under "network." and "criterion.". In evaluation
    `module(images)` is what the network returns.

    Args:
        network: images -> logits, as `criterion` takes them.
        criterion: `LoMixLoss` or any module called with (logits, target).

    Returns:
        A module with attributes `network` and `criterion`.

    Raises:
        TypeError: one of the two is not a module, or the network is a loss.
    """
    return NetworkWithLoss(network, criterion)
