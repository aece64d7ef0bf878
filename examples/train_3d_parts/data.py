"""Random 3D patches of the MNI152 template that the nilearn package carries; nothing is downloaded.

A project of its own puts its data set here: whatever yields images [B, 1, X, Y, Z] and labels [B, X, Y, Z].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lomix_fast.demo.data import CLASS_NAMES

from .options import OptionError, shape_text

__all__ = ["CLASS_NAMES", "NOTE", "Head", "Patches", "Volume", "load_head"]

NOTE = (
    "This is one template brain, the average of 152 people, and the held-out part is the back of the same head: the "
    "Dice values show that a network learns with this loss, not how accurate it would be on patients."
)

_HELD_OUT = 0.3  # of the brain's length, from the back
_GAP_MM = 8  # used for neither, between the two parts


@dataclass(frozen=True)
class Volume:
    """A box of the template.

    Attributes:
        image: [1, X, Y, Z] float32, zero mean and unit variance over the brain in the training part, clipped to
            [-4, 4]. x runs from left to right, y from back to front, z upwards.
        labels: [X, Y, Z] uint8, index into `CLASS_NAMES`.
    """

    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Head:
    """The front of the brain, to train on, and the back, to test on."""

    train: Volume
    held_out: Volume


def load_head(resolution: int) -> Head:
    """Load the template, label every voxel with the most probable class, crop it to the brain and split it.

    Args:
        resolution: edge of a voxel in mm; 1 is the template's own.

    Source: ICBM152 2009 (Fonov et al. 2011) through nilearn.datasets.load_mni152_template, _gm_ and _wm_template.
    """
    from nilearn import datasets  # not at the top: it takes seconds to import

    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    t1, grey, white = (np.asarray(load(resolution=resolution).get_fdata(), dtype=np.float32) for load in loaders)
    labels = np.stack([1 - grey - white, grey, white]).argmax(axis=0).astype(np.uint8)  # [X, Y, Z]

    inside = np.argwhere(labels > 0)
    box = tuple(slice(low, high + 1) for low, high in zip(inside.min(axis=0), inside.max(axis=0), strict=True))
    t1, labels = t1[box], labels[box]
    back = round(_HELD_OUT * labels.shape[1])
    front = back + round(_GAP_MM / resolution)
    brain = t1[:, front:][labels[:, front:] > 0]
    t1 = ((t1 - brain.mean()) / brain.std()).clip(-4, 4)
    parts = [
        Volume(
            torch.from_numpy(np.ascontiguousarray(t1[:, rows])).unsqueeze(0),
            torch.from_numpy(np.ascontiguousarray(labels[:, rows])),
        )
        for rows in (slice(front, None), slice(back))
    ]
    return Head(*parts)


class Patches:
    """Draws batches of random patches: anywhere in the volume, half of them mirrored, brightness and contrast varied.

    Args:
        volume: what to cut from.
        size: voxels of a patch along x, y, z.
        batch: patches in a batch.
        seed: of `generator`.

    Attributes:
        generator: the only source of randomness; with its state a checkpoint has everything.

    Raises:
        OptionError: a patch larger than the volume.
    """

    def __init__(self, volume: Volume, size: tuple[int, int, int], batch: int, seed: int) -> None:
        whole = tuple(volume.labels.shape)
        if any(part > all_ for part, all_ in zip(size, whole, strict=True)):
            raise OptionError(
                f"--patch: got {shape_text(size)}, expected at most {shape_text(whole)}, the part of the template to "
                "train on at this --resolution"
            )
        self.volume, self.size, self.batch = volume, size, batch
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return the next images [B, 1, *size], float32, and labels [B, *size], uint8."""
        drawn = [self._cut() for _ in range(self.batch)]
        images = torch.stack([image for image, _ in drawn])
        labels = torch.stack([label for _, label in drawn])
        mirrored = torch.rand(self.batch, generator=self.generator) < 0.5
        images[mirrored], labels[mirrored] = images[mirrored].flip(-3), labels[mirrored].flip(-3)
        contrast = 1 + 0.1 * torch.randn(self.batch, 1, 1, 1, 1, generator=self.generator)
        brightness = 0.1 * torch.randn(self.batch, 1, 1, 1, 1, generator=self.generator)
        return images * contrast + brightness, labels

    def _cut(self) -> tuple[Tensor, Tensor]:
        whole = self.volume.labels.shape
        starts = [
            int(torch.randint(all_ - part + 1, (), generator=self.generator))
            for part, all_ in zip(self.size, whole, strict=True)
        ]
        box = tuple(slice(start, start + part) for start, part in zip(starts, self.size, strict=True))
        return self.volume.image[(slice(None), *box)], self.volume.labels[box]
