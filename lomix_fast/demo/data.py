"""Brain slices with labels from the MNI152 template that the nilearn package carries; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASS_NAMES = ("background", "grey matter", "white matter")
NOTE = (
    "This is one template brain, the average of 152 people, and the held-out slices come from the same head: "
    "the Dice values show that a network learns with this loss, not how accurate it would be on patients."
)

_ALIGN = 16  # slice sizes are multiples of this, so that every level of the U-Net halves evenly


@dataclass(frozen=True)
class SliceSet:
    """Axial slices, front of the head up, left of the array first.

    Attributes:
        images: [N, 1, H, W] float32, T1 intensity, zero mean and unit variance over the brain of the training
            slices, clipped to [-4, 4].
        labels: [N, H, W] int64, index into `CLASS_NAMES`.
        numbers: N slice numbers in the volume, increasing.
        heights: N positions above the origin of MNI space, mm.
    """

    images: Tensor
    labels: Tensor
    numbers: tuple[int, ...]
    heights: tuple[float, ...]


@dataclass(frozen=True)
class Brain:
    """The two sets of slices of one template, and the edge of a pixel in mm."""

    train: SliceSet
    held_out: SliceSet
    resolution: int


def split_blocks(count: int, period: int = 30, held_out: int = 6, gap: int = 4) -> tuple[list[int], list[int]]:
    """Split neighbouring slices into training and held-out blocks with unused slices between them.

    Every `period` slices hold, in this order: training, gap, held-out, gap. Slices a few mm apart look alike,
    so a slice beside a held-out one is used for neither.

    Args:
        count: number of slices, numbered from 0.
        period: slices from one held-out block to the next.
        held_out: slices in a held-out block.
        gap: unused slices on each side of it.

    Returns:
        Training numbers and held-out numbers, each increasing; any two across the lists differ by more than `gap`.

    Raises:
        ValueError: no slice would be left for one of the two.
    """
    first = period - held_out - 2 * gap  # training slices of a period come first
    inside = [number % period for number in range(count)]
    train = [n for n, i in enumerate(inside) if i < first]
    tested = [n for n, i in enumerate(inside) if first + gap <= i < first + gap + held_out]
    if not train or not tested:
        raise ValueError(
            f"count: got {count} slices with period={period}, held_out={held_out}, gap={gap}, which leaves "
            f"{len(train)} to train on and {len(tested)} to test on; expected some of both, shorten the period"
        )
    return train, tested


def load_brain(resolution: int = 1) -> Brain:
    """Load the template, label it, cut it into slices and split them.

    Labels are the most probable of background, grey and white matter, background being what the two
    probability maps leave. Slices are the axial ones with at least 1 % tissue, cropped to the bounding box of the
    tissue over the whole brain and a margin, a multiple of 16 pixels.

    Args:
        resolution: edge of a voxel in mm; 1 is the template's own.

    Raises:
        ModuleNotFoundError: nilearn is missing; `lomix_fast.demo.cli.check_packages` says how to get it.
        ValueError: a resolution so coarse that no slice is left to test on.

    Source: ICBM152 2009 (Fonov et al. 2011) through nilearn.datasets.load_mni152_template, _gm_ and _wm_template.
    """
    from nilearn import datasets  # not at the top: it takes seconds to import

    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    volumes = [loader(resolution=resolution) for loader in loaders]
    t1, grey, white = (np.asarray(volume.get_fdata(), dtype=np.float32) for volume in volumes)  # [X, Y, Z]
    labels = np.stack([1 - grey - white, grey, white]).argmax(axis=0)  # [X, Y, Z]

    tissue = labels > 0
    numbers = np.flatnonzero(tissue.mean(axis=(0, 1)) > 0.01)
    x_box, y_box = (_box(np.flatnonzero(tissue.any(axis=axes))) for axes in ((1, 2), (0, 2)))
    t1, labels = (_cut(volume, x_box, y_box, numbers) for volume in (t1, labels))  # [N, H, W]

    mm = volumes[0].affine[2, 2] * numbers + volumes[0].affine[2, 3]
    sets = split_blocks(len(numbers), 30 // resolution, 6 // resolution, 4 // resolution)
    brain = t1[sets[0]][labels[sets[0]] > 0]  # statistics of training slices only
    scaled = ((t1 - brain.mean()) / brain.std()).clip(-4, 4)  # the empty outside would be at -7
    chosen = [
        SliceSet(
            images=torch.from_numpy(scaled[rows]).unsqueeze(1),
            labels=torch.from_numpy(labels[rows]),
            numbers=tuple(int(n) for n in numbers[rows]),
            heights=tuple(float(h) for h in mm[rows]),
        )
        for rows in sets
    ]
    return Brain(chosen[0], chosen[1], resolution)


def batches(data: SliceSet, size: int, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` random training batches.

    Slices are drawn in shuffled passes over the set; every slice of a batch is mirrored left to right half of the time,
    and its brightness and contrast vary a little.

    Args:
        data: training slices.
        size: B, slices in a batch, at most as many as `data` has.
        steps: number of batches.
        generator: the only source of randomness.

    Yields:
        Images [B, 1, H, W] float32 and labels [B, H, W] int64.

    Raises:
        ValueError: `size` is larger than the set.
    """
    count = len(data.numbers)
    if size > count:
        raise ValueError(f"--batch: got {size}, expected at most {count}, the training slices at this resolution")
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:size], order[size:]
        images, labels = data.images[rows], data.labels[rows]
        mirrored = torch.rand(size, generator=generator) < 0.5
        images[mirrored], labels[mirrored] = images[mirrored].flip(-1), labels[mirrored].flip(-1)
        contrast = 1 + 0.1 * torch.randn(size, 1, 1, 1, generator=generator)
        brightness = 0.1 * torch.randn(size, 1, 1, 1, generator=generator)
        yield images * contrast + brightness, labels


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` (or all, if fewer) numbers out of range(count), evenly spread, increasing."""
    wanted = min(wanted, count)
    return [round((i + 0.5) * count / wanted - 0.5) for i in range(wanted)]


def _box(inside: np.ndarray[tuple[int], np.dtype[np.intp]]) -> tuple[int, int]:
    """Start and length, a multiple of `_ALIGN`, of an interval around the indices given with a margin."""
    low, high = int(inside[0]) - 2, int(inside[-1]) + 2
    length = -(-(high - low + 1) // _ALIGN) * _ALIGN
    return low - (length - (high - low + 1)) // 2, length


def _cut(volume: np.ndarray, x: tuple[int, int], y: tuple[int, int], numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """[X, Y, Z] to [N, H, W]: the box of every slice, front up; zeros where the box leaves the volume."""
    padded = np.pad(volume, ((_ALIGN, _ALIGN), (_ALIGN, _ALIGN), (0, 0)))
    box = padded[x[0] + _ALIGN :, y[0] + _ALIGN :][: x[1], : y[1], numbers]
    return np.ascontiguousarray(box.transpose(2, 1, 0)[:, ::-1])
