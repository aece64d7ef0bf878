"""The heart of it: network and loss in one module, one optimizer for both, and one training step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lomix_fast import LoMixLoss, with_loss
from lomix_fast.demo.data import CLASS_NAMES

from .checkpoints import Stateful
from .losses import OfficialStyle, build_criterion, heads_of
from .networks import build_network
from .options import Settings
from .processes import Place

_NARROW = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_SCALE = 1.0  # of the gradient scaler; it begins at 65536 and is halved at every overflow


@dataclass(frozen=True)
class Trainer:
    """Everything that changes in training.

    Attributes:
        network: the network alone, for evaluation.
        criterion: the loss alone, for its weights.
        module: both, called as module(images, labels) -> loss; in DistributedDataParallel where there are several.
        optimizer, schedule: of the parameters of both.
        scaler: of the gradients; does nothing unless amp is "fp16".
        amp: "none", "bf16" or "fp16". device: where everything is.
    """

    network: nn.Module
    criterion: LoMixLoss | OfficialStyle
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    amp: str
    device: torch.device

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds, by name; the module is made of network and criterion."""
        names = [field.name for field in fields(self) if field.name not in ("module", "amp", "device")]
        return {name: getattr(self, name) for name in names}

    def autocast(self) -> torch.autocast:
        """Autocast as the settings ask for, or one that does nothing."""
        return torch.autocast(self.device.type, dtype=_NARROW[self.amp], enabled=self.amp != "none")

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do one training step.

        Args:
            images: [B, 1, X, Y, Z] on the device. labels: [B, X, Y, Z], any integer dtype.

        Returns:
            The loss, a detached scalar; reading it waits for the device.
        """
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.module(images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return loss.detach()

    def check(self, step: int, loss: float) -> None:
        """Stop a run that has gone wrong; called with the losses that are read anyway.

        Raises:
            FloatingPointError: the loss is not finite; with fp16, where a single overflow is the scaler's business,
                only once it has found no scale at which the gradients are finite.
        """
        if math.isfinite(loss):
            return
        if self.scaler.is_enabled() and self.scaler.get_scale() >= _LEAST_SCALE:
            return
        advice = "lower --lr" if self.amp == "none" else "lower --lr, or leave --amp out"
        raise FloatingPointError(f"the loss of step {step} is {loss}; {advice}")


def build_trainer(settings: Settings, place: Place) -> Trainer:
    """Make network, loss and optimizer; the process group has to be there where there are more processes.

    Args:
        settings: see `Settings`.
        place: of this process.
    """
    torch.manual_seed(settings.seed)
    num_classes, scales = len(CLASS_NAMES), settings.scales
    heads = heads_of(settings.loss, scales)
    network = build_network(settings.network, scales, heads, settings.filters, num_classes)
    criterion = build_criterion(settings.loss, num_classes, scales, place.is_distributed)

    # One module for both, so that DistributedDataParallel broadcasts and averages the parameters of the loss too.
    module: nn.Module = with_loss(network, criterion).to(place.device)
    groups: list[dict[str, Any]] = [{"params": list(network.parameters())}, *criterion.param_groups()]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=1e-4)  # the groups of the loss say 0 themselves
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 - done / settings.steps) ** 0.9)
    if place.is_distributed:
        ids = [place.device.index] if place.device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    torch.manual_seed(settings.seed + place.rank)  # whatever is random from here on differs between the processes
    scaler = torch.amp.GradScaler(place.device.type, enabled=settings.amp == "fp16")
    return Trainer(network, criterion, module, optimizer, schedule, scaler, settings.amp, place.device)
