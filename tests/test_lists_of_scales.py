"""What tells scales apart: stacks of them, lists of one size, and targets that come one a scale."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import NATIVE
from torch import Tensor, nn

from lomix_fast import LoMixLoss, MixPlan, lomix_loss, map_stats, with_loss

ORDER = {"order": "fine_to_coarse"}


def of_one_map(logits: Tensor, labels: Tensor) -> Tensor:
    """0.3 CE + 0.7 Dice with squares over the batch, in plain PyTorch; logits as large as the labels."""
    probabilities = logits.softmax(1)
    one_hot = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    axes = [0, *range(2, logits.dim())]
    sums = (probabilities**2).sum(axes) + (one_hot**2).sum(axes)
    dice = 1 - (2 * (probabilities * one_hot).sum(axes) + 1e-5) / (sums + 1e-5)
    return 0.3 * F.cross_entropy(logits, labels) + 0.7 * dice.mean()


def forms(labels: Tensor, classes: int) -> dict[str, Tensor]:
    one_hot = F.one_hot(labels, classes).movedim(-1, 1)
    return {"numbers": labels, "channel": labels.unsqueeze(1), "one-hot": one_hot, "soft": one_hot.double()}


FORMS = ("numbers", "channel", "one-hot", "soft")
SIZES = ((16,), (8, 6), (5, 4, 6))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_refused_or_taken_apart(form: str, scales: int, size: tuple[int, ...]) -> None:
    """Three classes, so with three scales a stack has the channels of one map."""
    stack = torch.randn(2, scales, 3, *size, dtype=torch.float64)
    labels = torch.randint(3, (2, *size))
    target = forms(labels, 3)[form]
    right = sum(of_one_map(z, labels) for z in stack.unbind(1))
    options: dict[str, Any] = {"supervision": "deep_supervision", **ORDER}
    for call in (LoMixLoss(3, scales, **options), LoMixLoss(3, scales, **options).map_losses):
        with pytest.raises(ValueError, match=r"^logits: got one tensor \(2, .*logits.unbind\(1\), or .*stacked_dim=1"):
            call(stack, target)
    torch.testing.assert_close(LoMixLoss(3, scales, **options)(list(stack.unbind(1)), target), right)
    criterion = LoMixLoss(3, scales, stacked_dim=1, **options)
    torch.testing.assert_close(criterion(stack, target), right)
    each = torch.stack([of_one_map(z, labels) for z in reversed(stack.unbind(1))])  # named from the coarsest scale
    torch.testing.assert_close(criterion.map_losses(stack, target), each)
    scales_first = LoMixLoss(3, scales, stacked_dim=0, **options)
    torch.testing.assert_close(scales_first(stack.transpose(0, 1), target), right)
    # What such a network returns in evaluation.
    torch.testing.assert_close(criterion(stack[:, 0], target), of_one_map(stack[:, 0], labels))


@pytest.mark.parametrize("impl", NATIVE)
def test_gradients_of_a_stack_are_stacked(impl: str) -> None:
    stack = torch.randn(2, 3, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (2, 8, 6))
    criterion = LoMixLoss(3, 3, supervision="deep_supervision", stacked_dim=1, impl=impl, **ORDER)
    (found,) = torch.autograd.grad(criterion(stack, labels), stack)
    (right,) = torch.autograd.grad(sum(of_one_map(z, labels) for z in stack.unbind(1)), stack)
    torch.testing.assert_close(found, right)


def test_a_stack_in_the_function() -> None:
    stack = torch.randn(2, 3, 3, 8, 6, dtype=torch.float64)
    labels, plan, weights = torch.randint(3, (2, 8, 6)), MixPlan.create(3, ()), torch.ones(3)
    right = sum(of_one_map(z, labels) for z in stack.unbind(1))
    torch.testing.assert_close(lomix_loss(stack, labels, weights, plan, stacked_dim=1), right)
    torch.testing.assert_close(lomix_loss(stack.transpose(0, 1), labels, weights, plan, stacked_dim=0), right)
    for call in (lambda: lomix_loss(stack, labels, weights, plan), lambda: map_stats(stack, labels, plan)):
        with pytest.raises(TypeError, match=r"logits: got Tensor, expected a list .*logits.unbind\(1\)"):
            call()
    with pytest.raises(ValueError, match="logits: got 2 tensors, expected 3"):
        lomix_loss(stack[:, :2], labels, weights, plan, stacked_dim=1)


@pytest.mark.parametrize("value", [2, -1, True, "1", 1.0], ids=repr)
def test_axes_that_cannot_be_stacked(value: Any) -> None:
    error = ValueError if type(value) is int else TypeError
    labels, maps = torch.zeros(1, 4, dtype=torch.long), [torch.zeros(1, 3, 4)]
    for call in (
        lambda: LoMixLoss(3, 2, stacked_dim=value),
        lambda: lomix_loss(maps, labels, torch.ones(1), MixPlan.create(1, ()), stacked_dim=value),
    ):
        with pytest.raises(error, match=f"stacked_dim: got {value!r}, expected None, 0 or 1"):
            call()


def test_another_number_of_scales_in_a_stack() -> None:
    criterion = LoMixLoss(4, 2, stacked_dim=1, **ORDER)
    with pytest.raises(ValueError, match="logits: got 3 tensors, expected num_scales=2"):
        criterion(torch.randn(2, 3, 4, 8, 8), torch.randint(4, (2, 8, 8)))


@pytest.mark.parametrize("slices", [1, 2, 4, 5])
def test_volumes_are_no_stacks(slices: int) -> None:
    """Of as many classes as scales, with every form of labels that can be told from those of a stack."""
    volume = torch.randn(2, 3, slices, 5, 4, dtype=torch.float64)
    labels = torch.randint(3, (2, slices, 5, 4))
    for options in ({}, {"stacked_dim": 1}):
        for target in forms(labels, 3).values():
            torch.testing.assert_close(LoMixLoss(3, 3, **options)(volume, target), of_one_map(volume, labels))


def test_a_volume_of_as_many_slices_as_classes_needs_labels_with_a_channel() -> None:
    volume, labels = torch.randn(2, 3, 3, 5, 4, dtype=torch.float64), torch.randint(3, (2, 3, 5, 4))
    with pytest.raises(ValueError, match=r"if it is one map of 3 slices, pass target.unsqueeze\(1\)"):
        LoMixLoss(3, 3)(volume, labels)
    torch.testing.assert_close(LoMixLoss(3, 3)(volume, labels.unsqueeze(1)), of_one_map(volume, labels))
    many = torch.randn(1, 9, 9, 5, 4, dtype=torch.float64)  # more than there can be scales
    labels = torch.randint(9, (1, 9, 5, 4))
    torch.testing.assert_close(LoMixLoss(9, 3)(many, labels), of_one_map(many, labels))
    one = torch.randn(2, 1, 1, 5, 4, dtype=torch.float64)  # one slice, one class: both ways the same numbers
    mask = torch.rand(2, 1, 5, 4, dtype=torch.float64) > 0.5
    criterion = LoMixLoss(1, 2, sigmoid=True)
    torch.testing.assert_close(criterion(one, mask), criterion(one, mask.unsqueeze(1)))


# Order -----------------------------------------------------------------------------------------------------------


def of_one_size() -> tuple[list[Tensor], Tensor]:
    return [torch.randn(2, 3, 8, 8) for _ in range(3)], torch.randint(3, (2, 8, 8))


def warned(call: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [one for one in found if "maps of one size" in str(one.message)]


def test_maps_of_one_size_warn_once_and_point_at_the_caller() -> None:
    logits, target = of_one_size()
    criterion = LoMixLoss(3, 3)
    for module in (criterion, with_loss(nn.Identity(), LoMixLoss(3, 3))):
        (one,) = warned(lambda module=module: module(logits, target))
        assert one.filename == __file__ and one.category is UserWarning
        assert re.search(r"assumed is order='coarse_to_fine'. Say it with LoMixLoss\(..., order=", str(one.message))
        assert not warned(lambda module=module: module(logits, target))
    assert not warned(lambda: criterion.map_losses(logits, target))
    assert len(warned(lambda: LoMixLoss(3, 3).map_losses(logits, target))) == 1
    copied = pickle.loads(pickle.dumps(copy.deepcopy(LoMixLoss(3, 3))))
    assert len(warned(lambda: copied(logits, target))) == 1


def test_replicas_warn_once_together() -> None:
    logits, target = of_one_size()
    criterion = LoMixLoss(3, 3, supervision="mutation")
    found = [warned(lambda: criterion._replicate_for_data_parallel().map_losses(logits, target)) for _ in range(3)]
    assert [len(one) for one in found] == [1, 0, 0]


def test_what_tells_the_order_does_not_warn() -> None:
    logits, target = of_one_size()
    for order in ("coarse_to_fine", "fine_to_coarse"):
        assert not warned(lambda order=order: LoMixLoss(3, 3, order=order)(logits, target))
    assert not warned(lambda: LoMixLoss(3, 3)([z[:, :, :4] for z in logits[:1]] + logits[1:], target))
    assert not warned(lambda: LoMixLoss(3, 3)(logits[0], target))
    assert not warned(lambda: LoMixLoss(3, 1)(logits[:1], target))


def test_a_compiled_criterion_warns_while_it_is_traced() -> None:
    logits, target = of_one_size()
    torch.compiler.reset()
    compiled = torch.compile(LoMixLoss(3, 3, operators=()), fullgraph=True, backend="eager")
    assert len(warned(lambda: compiled(logits, target))) == 1
    assert not warned(lambda: compiled(logits, target))


def test_the_default_reads_like_the_order_it_stands_for() -> None:
    unsaid, said = LoMixLoss(3, 2), LoMixLoss(3, 2, order="coarse_to_fine")
    assert repr(unsaid) == repr(said) and unsaid.order == "coarse_to_fine"
    assert unsaid.state_dict()["_extra_state"].equal(said.state_dict()["_extra_state"])
    assert "stacked_dim" not in repr(said) and "stacked_dim=1" in repr(LoMixLoss(3, 2, stacked_dim=1))


# Targets one a scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["coarse_to_fine", "fine_to_coarse"])
def test_of_targets_one_a_scale_that_of_full_size_is_used(order: str, form: str) -> None:
    full, half = torch.randint(3, (2, 8, 8)), torch.randint(3, (2, 4, 4))
    fine, coarse = (torch.randn(2, 3, n, n, dtype=torch.float64) for n in (8, 4))
    right = of_one_map(fine, full) + of_one_map(F.interpolate(coarse, (8, 8), mode="bilinear"), full)
    logits, targets = [coarse, fine], [forms(y, 3)[form] for y in (half, full)]
    if order == "fine_to_coarse":
        logits, targets = logits[::-1], targets[::-1]
    criterion = LoMixLoss(3, 2, supervision="deep_supervision", order=order)
    for given in (targets, tuple(targets)):
        torch.testing.assert_close(criterion(logits, given), right)
        torch.testing.assert_close(criterion.map_losses(logits, given).sum(), right)


def test_lists_of_targets_that_do_not_fit() -> None:
    full, half = torch.randint(3, (2, 8, 8)), torch.randint(3, (2, 4, 4))
    logits = [torch.randn(2, 3, n, n) for n in (4, 8)]
    for order, words in ((None, "coarse_to_fine"), ("fine_to_coarse", "fine_to_coarse")):
        criterion = LoMixLoss(3, 2, order=order)
        sign = 1 if order is None else -1
        for wrong in ([full, half], [full[:, :5, :5], full], [half, half[:, :2, :2]]):
            with pytest.raises(ValueError, match=f"target: got a list of sizes .* order='{words}'.*of full size alone"):
                criterion(logits[::sign], wrong[::sign])
        with pytest.raises(
            ValueError, match="target: got a list of 1 tensors, expected one tensor, or one for each of 2"
        ):
            criterion(logits[::sign], [full])
    words = "target: got list, expected a torch.Tensor of labels; of one a scale pass that of full size"
    for call in (
        lambda: LoMixLoss(3, 2)(logits[1], [half, full]),
        lambda: map_stats(logits, [half, full], MixPlan.create(2, ())),
        lambda: lomix_loss(logits, [half, full], torch.ones(2), MixPlan.create(2, ())),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_a_finer_target_than_the_finest_logits_is_used_too() -> None:
    labels = torch.randint(3, (2, 16, 16))
    logits = [torch.randn(2, 3, n, n, dtype=torch.float64) for n in (4, 8)]
    right = sum(of_one_map(F.interpolate(z, (16, 16), mode="bilinear"), labels) for z in logits)
    criterion = LoMixLoss(3, 2, supervision="deep_supervision")
    torch.testing.assert_close(criterion(logits, [labels[:, ::4, ::4], labels]), right)
