"""One training step of the loss alone, fused or in the official style, from the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..loss import LoMixLoss
from .official_style import OfficialStyleLoss, official_style_step

STYLES = ("fused", "official_style")


@dataclass(frozen=True)
class Case:
    """What both losses are given.

    Attributes:
        logits: L tensors [B, C, *native], coarsest first.
        target: labels [B, *full].
        parameters: state dict of a LoMixLoss with default settings (four operators, "cat" learned).
        impl: backend of the fused side, as `LoMixLoss` takes it.
    """

    logits: list[Tensor]
    target: Tensor
    parameters: dict[str, Tensor]
    impl: str

    def tiny(self) -> Case:
        """The same case with one sample and at most 32 labels along every axis, to wake up threads and libraries."""
        full = self.target.shape[1:]
        corners = [
            tuple(slice(max(1, size * 32 // whole)) for size, whole in zip(z.shape[2:], full, strict=True))
            for z in self.logits
        ]
        logits = [z[(slice(1), slice(None), *corner)] for z, corner in zip(self.logits, corners, strict=True)]
        target = self.target[(slice(1), *(slice(32) for _ in full))]
        return replace(self, logits=[z.contiguous() for z in logits], target=target.contiguous())

    def double(self) -> Case:
        """The same case in float64."""
        parameters = {name: value.double() for name, value in self.parameters.items()}
        return replace(self, logits=[z.double() for z in self.logits], parameters=parameters)


def make_step(style: str, case: Case) -> Callable[[], dict[str, Tensor]]:
    """Return a function that does one step, forward and backward of the loss alone, anew at every call.

    Args:
        style: one of `STYLES`.
        case: inputs and parameters; both styles are given the same values and compute in the dtype and on the device
            of the logits.

    Returns:
        () -> {"loss": scalar, then by name the gradient of every logits tensor and every parameter}, detached.

    Raises:
        ValueError: an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style: got {style!r}, expected one of {STYLES}")
    logits = [z.detach().clone().requires_grad_() for z in case.logits]
    num_classes, num_scales = logits[0].shape[1], len(logits)
    forward: Callable[[], Tensor]
    if style == "fused":
        criterion = LoMixLoss(num_classes, num_scales, impl=case.impl, order="coarse_to_fine").to(logits[0])
        criterion.load_state_dict(case.parameters)
        parameters: dict[str, Tensor] = dict(criterion.named_parameters())
        forward = lambda: criterion(logits, case.target)  # noqa: E731 (two ways to make one function)
    else:
        official = OfficialStyleLoss(num_classes, num_scales).to(logits[0])
        parameters = dict(official.named_parameters())
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(case.parameters[name])
        cat = [case.parameters[name].clone().requires_grad_() for name in ("cat_weight", "cat_bias")]
        parameters |= {"cat_weight": cat[0], "cat_bias": cat[1]}
        forward = lambda: official_style_step(official, logits, case.target, *cat)  # noqa: E731
    leaves = {f"logits_{i}": z for i, z in enumerate(logits)} | parameters

    def step() -> dict[str, Tensor]:
        loss = forward()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    return step
