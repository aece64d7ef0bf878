"""Pixels that do not count: none left gives exactly zero, some left the loss of those alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import NATIVE
from torch import Tensor

from lomix_fast import LoMixLoss, MixPlan, lomix_loss
from lomix_fast.weighting import WEIGHTING

backends = pytest.mark.parametrize("impl", NATIVE)
SIZES = ((2, 3), (4, 6), (8, 12))

# Preset, classes, options.
RECIPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "official": ("official", 3, {}),
    "monai": ("monai", 3, {}),
    "nnunet": ("nnunet", 3, {}),
    "nnunet regions": ("nnunet", 3, {"sigmoid": True}),
    "polyp": ("polyp", 1, {}),
    "polyp as released": ("polyp", 1, {"bce": "as_released"}),
    "no smoothing of the numerator": ("official", 3, {"smooth_nr": 0.0}),
    "no smoothing": ("monai", 3, {"smooth_nr": 0.0, "smooth_dr": 0.0}),
    "tversky": ("monai", 3, {"tversky": (0.3, 0.7), "smooth_nr": 1.0, "smooth_dr": 0.0}),
    "exclude": ("monai", 3, {"absent_classes": "exclude"}),
    "class weights": ("official", 3, {"weight": [1, 2, 3], "ce_weight": [1, 2, 3], "label_smoothing": 0.1}),
    "per sample": ("monai", 3, {"ce_per_sample": True, "squared_pred": True}),
}


def draw(name: str, batch: int = 2) -> tuple[list[Tensor], Tensor]:
    preset, classes, options = RECIPES[name]
    logits = [torch.randn(batch, classes, *n, requires_grad=True) for n in SIZES]
    is_dense = preset == "polyp" or options.get("sigmoid")
    target = (torch.rand(batch, classes, 8, 12) > 0.5) if is_dense else torch.randint(classes, (batch, 8, 12))
    return logits, target


def make(name: str, impl: str, **more: Any) -> LoMixLoss:
    preset, classes, options = RECIPES[name]
    return LoMixLoss.preset(preset, classes, 3, impl=impl, order="coarse_to_fine", **options, **more)


def check_zero(criterion: LoMixLoss, logits: list[Tensor], target: Tensor, **call: Tensor) -> None:
    losses = criterion.map_losses(logits, target, **call)
    assert (losses == 0).all()
    loss = criterion(logits, target, **call)
    assert loss.item() == 0
    leaves = [*logits, *criterion.parameters()]
    for grad in torch.autograd.grad(loss, leaves):
        assert (grad == 0).all()
    alone = criterion(logits[-1], target, **call)
    assert alone.item() == 0 and (torch.autograd.grad(alone, logits[-1])[0] == 0).all()


@backends
@pytest.mark.parametrize("weighting", WEIGHTING)
@pytest.mark.parametrize("name", RECIPES)
def test_nothing_counts(name: str, weighting: str, impl: str) -> None:
    """Loss and every gradient exactly 0: of the logits, of the mixes, and of alpha even with "uncertainty"."""
    logits, target = draw(name)
    nothing = torch.zeros(2, 8, 12, dtype=torch.bool)
    criterion = make(name, impl, weighting=weighting)
    check_zero(criterion, logits, target, mask=nothing)
    if criterion.reading["weighted_ce"]:
        check_zero(criterion, logits, target, weight_map=nothing.float())
    if target.dim() == 3:
        check_zero(make(name, impl, weighting=weighting, ignore_index=255), logits, torch.full_like(target, 255))


@backends
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("smooth", [0.0, 1e-5])
def test_nothing_counts_for_dice_alone(smooth: float, batch: bool, impl: str) -> None:
    """With weighted_ce=False a weight map of zeros leaves CE as it is, and Dice without a pixel."""
    logits, target = draw("monai")
    options = {"weighted_ce": False, "smooth_nr": smooth, "smooth_dr": smooth, "batch": batch, "impl": impl}
    criterion = LoMixLoss.preset("monai", 3, 3, supervision="mutation", **options)
    alone = LoMixLoss.preset("monai", 3, 3, supervision="mutation", lambda_dice=0.0, impl=impl)
    loss, expected = criterion(logits, target, weight_map=torch.zeros(2, 8, 12)), alone(logits, target)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, logits)
    for got, want in zip(torch.autograd.grad(loss, logits), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("label", [-1, -100, 3, 2**31])
def test_a_mask_hides_no_wrong_label(label: int, weighted: bool) -> None:
    """A label that is no class raises at a pixel that counts, whatever marks the others inside."""
    logits, target = draw("official")
    mask = torch.ones(2, 8, 12, dtype=torch.bool)
    mask[0, :4] = False
    target[1, 5, 5] = label
    criterion = LoMixLoss(3, 3, weighted_ce=weighted, impl="eager")
    for given in (target, target.double(), target.to(torch.int32) if label < 2**31 else target):
        with pytest.raises(ValueError, match=r"^target: got"):
            criterion(logits, given, mask)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("masked", [True, False])
def test_bad_logits_show_where_no_pixel_counts_too(masked: bool, value: float, impl: str) -> None:
    """The weight of such a pixel is 0, and 0 times NaN is NaN: what docs/recipes.md warns of."""
    logits, target = draw("official")
    with torch.no_grad():
        logits[-1][0, 0, 2, 3] = value
    mask = torch.ones(2, 8, 12, dtype=torch.bool)
    mask[0, 2, 3] = False
    criterion = LoMixLoss(3, 3, ignore_index=255, impl=impl)
    loss = criterion(logits, target, mask) if masked else criterion(logits, target.masked_fill(~mask, 255))
    assert not loss.isfinite()


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["official", "monai", "nnunet", "polyp"])
def test_bad_logits_still_show(name: str, value: float, impl: str) -> None:
    logits, target = draw(name)
    with torch.no_grad():
        logits[-1][0, 0, 2, 3] = value
    loss = make(name, impl)(logits, target, torch.rand(2, 8, 12) > -1)
    assert not loss.isfinite()


@backends
@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("polyp")])
def test_ignored_pixels_have_no_say(name: str, impl: str) -> None:
    """Neither the label nor the full-size logits of an ignored pixel matter, and its logits get no gradient.

    Not so with the structure loss, whose weights are made of the labels around a pixel.
    """
    logits, target = draw(name)
    mask = torch.rand(2, 8, 12) > 0.4
    criterion = make(name, impl, supervision="last_layer")
    other = logits[-1].detach().clone()
    other[~mask.unsqueeze(1).expand_as(other)] = 7.0
    other.requires_grad_()
    noise = torch.where(mask if target.dim() == 3 else mask.unsqueeze(1), target, torch.zeros_like(target))
    losses = [criterion([*logits[:2], z], y, mask) for z, y in ((logits[-1], target), (other, noise))]
    torch.testing.assert_close(losses[0], losses[1])
    (grad,) = torch.autograd.grad(losses[1], other)
    assert (grad[~mask.unsqueeze(1).expand_as(grad)] == 0).all() and (grad != 0).any()


def full_size(name: str) -> tuple[list[Tensor], Tensor]:
    logits, target = draw(name)
    return [torch.randn(2, logits[0].shape[1], 8, 12, dtype=torch.float64) for _ in range(3)], target


@backends
@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("polyp")])
def test_mask_is_ignore_index_is_cutting_the_pixels_out(name: str, impl: str) -> None:
    logits, target = full_size(name)
    mask = torch.zeros(2, 8, 12, dtype=torch.bool)
    mask[..., :7] = True
    criterion = make(name, impl).double()
    cut = criterion([z[..., :7] for z in logits], target[..., :7])
    for given in (mask, mask.unsqueeze(1), mask.to(torch.uint8) * 255, mask.float()):
        torch.testing.assert_close(criterion(logits, target, given), cut)
    torch.testing.assert_close(criterion(logits, target, weight_map=mask.double()), cut)
    torch.testing.assert_close(criterion(logits, target, mask, torch.ones(2, 8, 12)), cut)
    if target.dim() == 3:
        for label in (255, -1):
            again = make(name, impl, ignore_index=label).double()
            again.load_state_dict(criterion.state_dict())
            torch.testing.assert_close(again(logits, target.masked_fill(~mask, label)), cut)


@backends
def test_one_binary_mask_with_an_ignore_label(impl: str) -> None:
    """Sigmoid over one class: the target has room for a third value."""
    logits, target = full_size("polyp")
    mask = torch.rand(2, 8, 12) > 0.5
    options = {"supervision": "deep_supervision", "sigmoid": True, "impl": impl, "order": "coarse_to_fine"}
    expected = LoMixLoss(1, 3, **options)(logits, target, mask)
    for labels in (target.to(torch.uint8), target.double(), target[:, 0].long()):
        ignored = labels.masked_fill(~(mask if labels.dim() == 3 else mask.unsqueeze(1)), 255)
        torch.testing.assert_close(LoMixLoss(1, 3, ignore_index=255, **options)(logits, ignored), expected)


@backends
@pytest.mark.parametrize("name", ["monai", "polyp", "per sample"])
def test_a_sample_of_which_nothing_counts_is_one_without_loss(name: str, impl: str) -> None:
    """Per sample: it contributes 0, and the mean is over all samples."""
    logits, target = draw(name)
    mask = torch.ones(2, 8, 12, dtype=torch.bool)
    mask[1] = False
    criterion = make(name, impl, lambda_ce=0.0 if name == "monai" else 1.0)
    alone = criterion.map_losses([z[:1] for z in logits], target[:1])
    torch.testing.assert_close(criterion.map_losses(logits, target, mask), alone / 2)


@backends
@pytest.mark.parametrize("name", ["official", "nnunet"])
def test_a_sample_of_which_nothing_counts_is_not_there(name: str, impl: str) -> None:
    """Over the batch: sums do not see it."""
    logits, target = draw(name)
    mask = torch.ones(2, 8, 12, dtype=torch.bool)
    mask[1] = False
    criterion = make(name, impl)
    alone = criterion.map_losses([z[:1] for z in logits], target[:1])
    torch.testing.assert_close(criterion.map_losses(logits, target, mask), alone)


@backends
def test_mask_and_weight_map_multiply_and_the_function_agrees(impl: str) -> None:
    logits, target = full_size("official")
    mask, weight = torch.rand(2, 8, 12) > 0.3, torch.rand(2, 8, 12, dtype=torch.float64)
    options = {"ce_weight": [1, 2, 3], "absent_classes": "exclude", "order": "coarse_to_fine"}
    criterion = LoMixLoss(3, 3, supervision="mutation", impl=impl, **options)
    expected = criterion(logits, target, weight_map=weight * mask)
    torch.testing.assert_close(criterion(logits, target, mask, weight), expected)
    plan = MixPlan.create(3, ("add",))
    options = {"ce_weight": [1.0, 2.0, 3.0], "absent_classes": "exclude", "impl": impl}
    found = lomix_loss(logits, target, torch.ones(plan.num_maps), plan, mask=mask, weight_map=weight, **options)
    torch.testing.assert_close(found, expected)
