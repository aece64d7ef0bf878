"""Losses of other projects held against ours: targets, and the comparison of loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lomix_fast import LoMixLoss

Original = Callable[[Tensor, Tensor], Tensor]

SIZES = {1: ((11,), (23,)), 2: ((5, 6), (10, 13)), 3: ((3, 4, 2), (6, 7, 5))}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
WEIGHT = torch.tensor([0.5, 1.0, 3.0, 0.3], dtype=torch.float64)
# nnU-Net's Dice sums are float32: sums of some hundred terms, with an error of a few units of 2^-24.
NNUNET = {"rtol": 1e-6, "atol": 1e-8}
EXACT = {"rtol": 1e-11, "atol": 1e-14}


def labels(classes: int, axes: int = 2, batch: int = 3) -> Tensor:
    """Class numbers [B, 1, *full]; the last class is missing in sample 0."""
    target = torch.randint(classes, (batch, 1, *SIZES[axes][1]))
    target[0] = target[0].clamp(max=max(classes - 2, 0))
    return target


def one_hot(target: Tensor) -> Tensor:
    """Class numbers [B, 1, *full] of 4 classes -> [B, 4, *full] in float64."""
    return F.one_hot(target[:, 0], 4).movedim(-1, 1).double()


def regions(classes: int, axes: int = 2) -> Tensor:
    """One 0 or 1 a class [B, C, *full], overlapping."""
    return (torch.rand(3, classes, *SIZES[axes][1]) > 0.6).double()


def shares(classes: int) -> Tensor:
    """Soft labels [B, C, *full] that add up to 1."""
    return torch.randn(3, classes, *SIZES[2][1], dtype=torch.float64).softmax(1)


def check(
    criterion: LoMixLoss,
    original: Original,
    target: Tensor,
    theirs: Tensor | None = None,
    constant: float = 0.0,
    tolerance: dict[str, float] = EXACT,
    **call: Tensor,
) -> None:
    """Loss and gradient equal those of the original, for native and full-size logits, in a list and alone."""
    axes = target.dim() - 2
    theirs = target if theirs is None else theirs
    for size in SIZES[axes]:
        logits = (2 * torch.randn(3, criterion.num_classes, *size, dtype=torch.float64)).requires_grad_()
        coarse = torch.randn(3, criterion.num_classes, *[1] * axes, dtype=torch.float64)
        full = F.interpolate(logits, size=SIZES[axes][1], mode=MODES[axes], align_corners=False)
        expected = original(full, theirs) + constant
        (want,) = torch.autograd.grad(expected, logits)
        for given in ([coarse, logits], logits):
            found = criterion(given, target, **call)
            (got,) = torch.autograd.grad(found, logits)
            torch.testing.assert_close(found, expected.double(), **tolerance)
            torch.testing.assert_close(got, want, rtol=tolerance["rtol"], atol=tolerance["rtol"] * want.abs().max())


def last(classes: int, impl: str = "eager", preset: str = "official", **options: Any) -> LoMixLoss:
    return LoMixLoss.preset(preset, classes, 2, supervision="last_layer", impl=impl, **options)
