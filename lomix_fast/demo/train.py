"""Training with the LoMix loss, and the Dice of the finest head on slices kept apart."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..loss import LoMixLoss
from .data import CLASS_NAMES, SliceSet, batches


@dataclass(frozen=True)
class Training:
    """What happened: seconds spent, those spent in the loss (forward and backward of it), the loss of each step."""

    seconds: float
    losses: tuple[float, ...]


def train(
    network: nn.Module,
    criterion: LoMixLoss,
    data: SliceSet,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> Training:
    """Train `network` and the parameters of `criterion` together, in place.

    AdamW with a one-cycle learning rate. The parameters of the criterion are a group of their own without weight
    decay, which would pull the softplus weights towards 0.693. A progress bar is shown on a terminal; elsewhere a
    line is printed ten times.

    Args:
        network: images [B, 1, H, W] to a list of logits, coarsest first.
        criterion: the loss, with parameters or without.
        data: training slices.
        steps: optimizer steps, at least 1.
        batch: slices a step.
        learning_rate: its peak.
        seed: of the batches.

    Raises:
        FloatingPointError: the loss stopped being finite.
    """
    groups: list[dict[str, Any]] = [{"params": list(network.parameters())}, *criterion.param_groups()]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    shown = sys.stderr.isatty()
    losses: list[float] = []
    network.train()
    begin = time.perf_counter()
    bar = tqdm(batches(data, batch, steps, generator), total=steps, desc="training", unit="step", disable=not shown)
    for images, labels in bar:
        optimizer.zero_grad()
        loss = criterion(network(images), labels)
        losses.append(loss.item())
        if not losses[-1] < float("inf"):
            raise FloatingPointError(f"the loss of step {len(losses)} is {losses[-1]}; lower the learning rate")
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
        if not shown and len(losses) % max(1, steps // 10) == 0:
            elapsed = time.perf_counter() - begin
            print(f"  step {len(losses):4d} of {steps}, loss {losses[-1]:.2f}, {elapsed:.0f} s", flush=True)
    return Training(time.perf_counter() - begin, tuple(losses))


@torch.no_grad()
def predict(network: nn.Module, data: SliceSet, batch: int = 8) -> Tensor:
    """Class of every pixel by the finest head, [N, H, W] int64; `data.images` [N, 1, H, W]."""
    network.eval()
    return torch.cat([network(images)[-1].argmax(dim=1) for images in data.images.split(batch)])


def dice(prediction: Tensor, labels: Tensor) -> dict[str, float]:
    """Dice of each class but the background over all pixels given, in [0, 1]; 1 where a class is in neither.

    Args:
        prediction: [..., H, W] class indices into `CLASS_NAMES`.
        labels: likewise, same shape.
    """
    scores = {}
    for index, name in enumerate(CLASS_NAMES[1:], start=1):
        found, true = prediction == index, labels == index
        total = int(found.sum() + true.sum())
        scores[name] = 2 * int((found & true).sum()) / total if total else 1.0
    return scores
