"""Recipes and presets against the objects of the projects they come from: loss and gradient, not formulas of our own.

Each is compared in `last_layer` mode, with native logits enlarged by torch for the original. float64 throughout, except
that nnU-Net sums its Dice in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import NATIVE
from monai.losses import DiceCELoss, DiceLoss, TverskyLoss
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from originals import NNUNET, SIZES, WEIGHT, check, labels, last, one_hot, regions, shares
from torch import Tensor

from lomix_fast import LoMixLoss
from lomix_fast.structure import structure_weights

backends = pytest.mark.parametrize("impl", NATIVE)

# MONAI --------------------------------------------------------------------------------------------------------------

# Options of ours, of MONAI's, besides the preset "monai" and softmax over 4 classes.
SOFTMAX: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "squared_pred": ({"squared_pred": True}, {"squared_pred": True}),
    "jaccard": ({"jaccard": True}, {"jaccard": True}),
    "jaccard squared": ({"jaccard": True, "squared_pred": True}, {"jaccard": True, "squared_pred": True}),
    "batch": ({"batch": True}, {"batch": True}),
    "without background": ({"include_background": False}, {"include_background": False}),
    "smoothing": ({"smooth_nr": 0.5, "smooth_dr": 2.0}, {"smooth_nr": 0.5, "smooth_dr": 2.0}),
    "factors": ({"lambda_ce": 0.25, "lambda_dice": 3.0}, {"lambda_ce": 0.25, "lambda_dice": 3.0}),
    "label_smoothing": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
}


@backends
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("name", SOFTMAX)
def test_monai_dice_ce_softmax(name: str, axes: int, impl: str) -> None:
    ours, theirs = SOFTMAX[name]
    target = labels(4, axes)
    # Its own one-hot labels are float32, and with squared_pred it squares a float32 norm of them.
    original = DiceCELoss(softmax=True, **theirs)
    check(last(4, impl, "monai", **ours), original, target, one_hot(target))
    if not theirs.get("squared_pred"):
        check(last(4, impl, "monai", **ours), DiceCELoss(softmax=True, to_onehot_y=True, **theirs), target)


@backends
@pytest.mark.parametrize("background", [True, False])
def test_monai_class_weights(background: bool, impl: str) -> None:
    """MONAI's one weight goes to CE and to Dice, and so does that of the preset."""
    original = DiceCELoss(softmax=True, to_onehot_y=True, include_background=background, weight=WEIGHT)
    options = {"include_background": background}
    own = WEIGHT if background else WEIGHT[1:]
    for weight in ({"weight": WEIGHT}, {"weight": WEIGHT.tolist()}, {"weight": own, "ce_weight": WEIGHT}):
        check(last(4, impl, "monai", **options, **weight), original, labels(4))
    # With a weight of CE given, or none asked for, it is that of Dice alone.
    for ce_weight in (None, WEIGHT.flip(0)):
        ce = torch.nn.CrossEntropyLoss(weight=ce_weight)
        dice = DiceLoss(softmax=True, to_onehot_y=True, weight=own, **options)
        criterion = last(4, impl, "monai", weight=own, ce_weight=ce_weight, **options)
        check(criterion, lambda z, y, ce=ce, dice=dice: ce(z, y[:, 0]) + dice(z, y), labels(4))


@backends
def test_monai_one_weight_for_all_classes(impl: str) -> None:
    def original(z: Tensor, y: Tensor) -> Tensor:
        return DiceLoss(softmax=True, to_onehot_y=True, weight=torch.tensor(0.75, dtype=torch.float64))(z, y)

    for weight in (0.75, torch.tensor(0.75)):
        check(last(4, impl, "monai", lambda_ce=0.0, weight=weight), original, labels(4))


def test_monai_arguments_that_say_what_we_do() -> None:
    arguments = {"softmax": True, "to_onehot_y": True, "reduction": "mean"}
    check(last(4, preset="monai", **arguments), DiceCELoss(**arguments), labels(4))
    arguments = {"softmax": False, "sigmoid": True, "to_onehot_y": False, "reduction": "mean"}
    check(last(1, preset="monai", **arguments), DiceCELoss(**arguments), regions(1))


@backends
@pytest.mark.parametrize("squared", [True, False])
def test_monai_soft_labels(squared: bool, impl: str) -> None:
    """MONAI's sums of products are those for soft labels too, with soft_label=False."""
    original = DiceCELoss(softmax=True, squared_pred=squared)
    check(last(4, impl, "monai", squared_pred=squared), original, shares(4))


@backends
def test_monai_one_hot_labels_are_class_numbers(impl: str) -> None:
    target = labels(4)
    for given in (one_hot(target), one_hot(target).bool(), one_hot(target).to(torch.uint8)):
        check(last(4, impl, "monai"), DiceCELoss(softmax=True, to_onehot_y=True), given, target)


@backends
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("pos_weight", [None, 2.5])
def test_monai_dice_ce_of_one_sigmoid(pos_weight: float | None, axes: int, impl: str) -> None:
    weight = None if pos_weight is None else torch.tensor([pos_weight], dtype=torch.float64)
    original = DiceCELoss(sigmoid=True, weight=weight)
    target = regions(1, axes)
    check(last(1, impl, "monai", sigmoid=True, ce_weight=weight), original, target)
    check(last(1, impl, "monai", sigmoid=True, weight=weight), original, target)


@backends
@pytest.mark.parametrize("name", ["defaults", "squared_pred", "jaccard", "batch", "without background", "smoothing"])
def test_monai_dice_and_bce_of_many_sigmoids(name: str, impl: str) -> None:
    ours, theirs = SOFTMAX[name]
    dice = DiceLoss(sigmoid=True, **theirs)
    check(
        last(3, impl, "monai", sigmoid=True, **ours),
        lambda z, y: dice(z, y) + torch.nn.BCEWithLogitsLoss()(z, y),
        regions(3),
    )


@backends
def test_pos_weight_of_many_sigmoids(impl: str) -> None:
    weight = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
    bce = torch.nn.BCEWithLogitsLoss(pos_weight=weight.view(3, 1, 1))
    criterion = last(3, impl, "monai", sigmoid=True, ce_weight=weight, lambda_dice=0.0)
    check(criterion, bce, regions(3))


@backends
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_monai_tversky(batch: bool, background: bool, impl: str) -> None:
    options = {"batch": batch, "include_background": background, "smooth_nr": 0.5, "smooth_dr": 1.5}
    original = TverskyLoss(softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7, **options)
    check(last(4, impl, "monai", tversky=(0.3, 0.7), lambda_ce=0.0, **options), original, labels(4))
    original = TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7, **options)
    criterion = last(3, impl, "monai", sigmoid=True, tversky=(0.3, 0.7), lambda_ce=0.0, **options)
    check(criterion, original, regions(3))


@backends
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_mask_is_torch_and_monai_on_the_pixels_left(weighted: bool, batch: bool, impl: str) -> None:
    """CE of torch with the masked pixels ignored, Dice of MONAI on the others as one row of pixels."""
    mask = torch.rand(3, *SIZES[2][1]) > 0.4
    ce = torch.nn.CrossEntropyLoss(ignore_index=-100)
    dice = DiceLoss(softmax=True, to_onehot_y=True)

    def original(z: Tensor, y: Tensor) -> Tensor:
        parts = [(z, y, mask)] if batch else [(z[b : b + 1], y[b : b + 1], mask[b : b + 1]) for b in range(3)]
        rows = [(zs.movedim(1, -1)[left].t()[None], ys[:, 0][left][None, None]) for zs, ys, left in parts]
        return 0.4 * ce(z, y[:, 0].masked_fill(~mask, -100)) + 1.7 * torch.stack([dice(*row) for row in rows]).mean()

    options = {"lambda_ce": 0.4, "lambda_dice": 1.7, "batch": batch, "weighted_ce": weighted}
    target = labels(4)
    check(last(4, impl, "monai", **options), original, target, mask=mask)
    ignored = target.masked_fill(~mask.unsqueeze(1), 255)
    check(last(4, impl, "monai", ignore_index=255, **options), original, ignored, target)


@backends
def test_official_is_monai_with_other_numbers(impl: str) -> None:
    original = DiceCELoss(softmax=True, squared_pred=True, batch=True, lambda_ce=0.3, lambda_dice=0.7)
    target = labels(4)
    for criterion in (last(4, impl), LoMixLoss(4, 2, supervision="last_layer", impl=impl)):
        check(criterion, original, target, one_hot(target))


# nnU-Net ------------------------------------------------------------------------------------------------------------

SOFT_DICE = {"smooth": 1e-5, "ddp": False}


@backends
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("axes", [2, 3])
def test_nnunet_dc_and_ce(axes: int, ignore: int | None, batch: bool, impl: str) -> None:
    """Its Dice is -dc, ours 1 - dc; the ignore label is the highest value, and no class."""
    dice = {"batch_dice": batch, "do_bg": False, **SOFT_DICE}
    original = DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    target = labels(3 if ignore is None else 4, axes).to(torch.int16)
    criterion = last(3, impl, "nnunet", batch=batch, ignore_index=ignore)
    check(criterion, original, target, constant=1.0, tolerance=NNUNET)


@backends
@pytest.mark.parametrize("batch", [True, False])
def test_nnunet_regions(batch: bool, impl: str) -> None:
    original = DC_and_BCE_loss({}, {"batch_dice": batch, "do_bg": True, **SOFT_DICE})
    criterion = last(3, impl, "nnunet", sigmoid=True, batch=batch)
    check(criterion, lambda z, y: original(z, y), regions(3), constant=1.0, tolerance=NNUNET)


@backends
def test_nnunet_regions_with_the_ignore_channel(impl: str) -> None:
    """There nnU-Net divides BCE by pixels rather than by pixels and classes: lambda_ce=C makes up for it."""
    original = DC_and_BCE_loss({}, {"batch_dice": True, "do_bg": True, **SOFT_DICE}, use_ignore_label=True)
    target, ignored = regions(3), (torch.rand(3, 1, *SIZES[2][1]) > 0.7)
    criterion = last(3, impl, "nnunet", sigmoid=True, lambda_ce=3.0)
    theirs = torch.cat([target, ignored.double()], 1)
    check(criterion, original, target, theirs, constant=1.0, tolerance=NNUNET, mask=~ignored)


@backends
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_nnunet_memory_efficient_dice(masked: bool, background: bool, impl: str) -> None:
    dice = MemoryEfficientSoftDiceLoss(lambda z: z.softmax(1), batch_dice=True, do_bg=background, **SOFT_DICE)
    mask = torch.rand(3, 1, *SIZES[2][1]) > 0.4
    criterion = last(3, impl, "nnunet", lambda_ce=0.0, include_background=background)
    call = {"mask": mask} if masked else {}
    check(criterion, lambda z, y: dice(z, y, **{"loss_mask": mask} if masked else {}), labels(3), constant=1.0,
          tolerance=NNUNET, **call)  # fmt: skip


# PraNet -------------------------------------------------------------------------------------------------------------


def structure_loss(pred: Tensor, mask: Tensor) -> Tensor:
    """PraNet's loss as its paper has it, from the formula."""
    w = 1 + 5 * (F.avg_pool2d(mask, kernel_size=31, stride=1, padding=15) - mask).abs()
    bce = F.binary_cross_entropy_with_logits(pred, mask, reduction="none")
    wbce = (w * bce).sum((2, 3)) / w.sum((2, 3))
    p = pred.sigmoid()
    inter, union = (w * p * mask).sum((2, 3)), (w * (p + mask)).sum((2, 3))
    return (wbce + 1 - (inter + 1) / (union - inter + 1)).mean()


def structure_loss_as_released(pred: Tensor, mask: Tensor) -> Tensor:
    """The same with the deprecated argument that the released code passes, which means the mean."""
    w = 1 + 5 * (F.avg_pool2d(mask, kernel_size=31, stride=1, padding=15) - mask).abs()
    bce = F.binary_cross_entropy_with_logits(pred, mask, reduce="none")
    wbce = (w * bce).sum((2, 3)) / w.sum((2, 3))
    p = pred.sigmoid()
    inter, union = (w * p * mask).sum((2, 3)), (w * (p + mask)).sum((2, 3))
    return (wbce + 1 - (inter + 1) / (union - inter + 1)).mean()


@backends
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bce", ["weighted", "as_released"])
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_polyp(bce: str, soft: bool, impl: str) -> None:
    original = structure_loss if bce == "weighted" else structure_loss_as_released
    target = torch.rand(3, 1, *SIZES[2][1], dtype=torch.float64) if soft else regions(1)
    check(last(1, impl, "polyp", bce=bce), original, target)


def test_the_variants_of_polyp_differ() -> None:
    logits, target = [torch.randn(2, 1, 9, 9)], regions(1)[:2, :, :9, :9]
    losses = [
        LoMixLoss.preset("polyp", 1, 1, bce=bce, impl="eager")(logits, target) for bce in ("weighted", "as_released")
    ]
    assert (losses[0] - losses[1]).abs() > 1e-3
    assert torch.equal(LoMixLoss.preset("polyp", 1, 1, impl="eager")(logits, target), losses[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_structure_weights_pool_with_zeros_beyond_the_border(axes: int) -> None:
    """Our mean goes axis by axis; torch's goes over the whole box."""
    mask = torch.rand(2, *(40, 33, 7)[:axes], dtype=torch.float64)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    mean = pool(F.pad(mask.unsqueeze(1), [15] * 2 * axes), 31, 1).squeeze(1)
    if axes < 3:  # torch's own padding refuses volumes thinner than the window
        torch.testing.assert_close(mean, pool(mask.unsqueeze(1), 31, 1, 15, count_include_pad=True).squeeze(1))
    expected = 1 + 5 * (mean - mask).abs()
    torch.testing.assert_close(structure_weights(mask, torch.float64), expected, rtol=1e-12, atol=0)
    assert structure_weights(mask > 0.5).dtype == torch.float32


@backends
@pytest.mark.parametrize("given", ["mask", "weight_map", "both"])
def test_structure_times_what_is_given(given: str, impl: str) -> None:
    target = regions(1)
    mask, weight = torch.rand(3, 10, 13) > 0.3, torch.rand(3, 10, 13, dtype=torch.float64)
    call = {name: value for name, value in (("mask", mask), ("weight_map", weight)) if given in (name, "both")}
    product = structure_weights(target[:, 0], torch.float64)
    for value in call.values():
        product = product * value
    logits = [torch.randn(3, 1, 10, 13, dtype=torch.float64)]
    polyp = LoMixLoss.preset("polyp", 1, 1, impl=impl)
    options = {"jaccard": True, "ce_per_sample": True, "smooth_nr": 2.0, "smooth_dr": 2.0, "sigmoid": True}
    plain = LoMixLoss.preset("monai", 1, 1, impl=impl, **options)
    torch.testing.assert_close(polyp(logits, target, **call), plain(logits, target, weight_map=product))


@backends
def test_a_mask_reaches_unweighted_cross_entropy(impl: str) -> None:
    """With weighted_ce=False a weight map is for Dice alone, but a mask is for both."""
    target, mask = regions(1), torch.rand(3, 10, 13) > 0.3
    logits = torch.randn(3, 1, 10, 13, dtype=torch.float64)
    criterion = LoMixLoss.preset("polyp", 1, 1, bce="as_released", lambda_dice=0.0, impl=impl)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")[:, 0]
    for labels_ in (target, target.bool(), target.to(torch.uint8), target[:, 0], target.half()):
        torch.testing.assert_close(criterion(logits, labels_, mask), bce[mask].mean())
        torch.testing.assert_close(criterion(logits, labels_, mask.int(), torch.rand(3, 10, 13)), bce[mask].mean())


# In every mode ------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("name", ["official", "monai", "nnunet", "nnunet regions", "polyp"])
def test_presets_train_with_every_map(name: str, impl: str) -> None:
    preset, _, sigmoid = name.partition(" ")
    classes = 1 if preset == "polyp" else 3
    options = {"sigmoid": True} if sigmoid else {}
    criterion = LoMixLoss.preset(
        preset, classes, 3, impl=impl, operators=("add", "mul", "cat", "awf", "avg"), **options
    )
    logits = [torch.randn(2, classes, n, n, requires_grad=True) for n in (2, 4, 8)]
    dense = preset == "polyp" or sigmoid
    target = (torch.rand(2, classes, 8, 8) > 0.5) if dense else torch.randint(classes, (2, 8, 8))
    loss = criterion(logits, target)
    loss.backward()
    torch.testing.assert_close(loss, (criterion.map_weights() * criterion.map_losses(logits, target)).sum())
    assert loss.isfinite() and all(z.grad.abs().min() > 0 for z in logits)
    for parameter in criterion.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
