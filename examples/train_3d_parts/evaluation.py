"""Dice on the part of the head that was not trained on."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference

from lomix_fast.demo.train import dice

from .data import Volume
from .options import Settings
from .step import Trainer


@torch.no_grad()
def held_out_dice(trainer: Trainer, volume: Volume, settings: Settings) -> dict[str, float]:
    """Dice of each class but the background over all voxels of the volume, by the finest map.

    The volume is gone through in windows as large as a training patch that overlap by a quarter.

    Args:
        trainer: its network is left in evaluation mode.
        volume: what to segment.
        settings: patch and batch of the windows.
    """
    trainer.network.eval()
    with trainer.autocast():
        logits = sliding_window_inference(
            volume.image.unsqueeze(0),  # stays on the CPU, as do the logits of the whole volume; windows move
            settings.patch,
            settings.batch,
            lambda windows: trainer.network(windows.to(trainer.device)).float().cpu(),
            overlap=0.25,
            mode="gaussian",
        )
    return dice(logits.argmax(dim=1)[0], volume.labels)
