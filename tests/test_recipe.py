"""From statistics to losses: CE against torch's, Dice against a literal one, and every option of both."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lomix_fast import MixPlan, lomix_loss, map_stats
from lomix_fast.recipe import map_losses, total_loss

CLASSES = 4


def draw(batch: int = 3, scales: int = 2) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(batch, CLASSES, 5, 7, dtype=torch.float64) for _ in range(scales)]
    return logits, torch.randint(CLASSES, (batch, 5, 7))


def table(logits: list[Tensor], target: Tensor, squared: bool = True) -> tuple[Tensor, Tensor]:
    return map_stats(logits, target, MixPlan.create(len(logits), (), squared=squared), impl="eager")


def literal_dice(
    logits: Tensor, target: Tensor, squared: bool, batch: bool, background: bool, nr: float, dr: float
) -> float:
    """Dice of one map [B, C, *full], class by class and, unless `batch`, sample by sample."""
    s = logits.softmax(1)
    groups = [range(s.shape[0])] if batch else [[b] for b in range(s.shape[0])]
    losses = []
    for group in groups:
        for c in range(0 if background else 1, s.shape[1]):
            inter = sum((s[b, c] * (target[b] == c)).sum().item() for b in group)
            denominator = sum((s[b, c] ** 2 if squared else s[b, c]).sum().item() for b in group)
            labels = sum((target[b] == c).sum().item() for b in group)
            losses.append(1 - (2 * inter + nr) / (denominator + labels + dr))
    return sum(losses) / len(losses)


def test_cross_entropy_is_that_of_torch() -> None:
    logits, target = draw()
    found = map_losses(*table(logits, target), lambda_ce=1.0, lambda_dice=0.0)
    expected = torch.stack([F.cross_entropy(z, target) for z in logits])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("smooth", [(1e-5, 1e-5), (0.0, 1e-5), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_dice(squared: bool, batch: bool, background: bool, smooth: tuple[float, float]) -> None:
    logits, target = draw()
    target[1] = 2  # a sample in which most classes are missing
    found = map_losses(
        *table(logits, target, squared),
        lambda_ce=0.0,
        lambda_dice=1.0,
        smooth_nr=smooth[0],
        smooth_dr=smooth[1],
        include_background=background,
        batch=batch,
    )
    expected = [literal_dice(z, target, squared, batch, background, *smooth) for z in logits]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_two_terms_add_up_with_their_weights() -> None:
    stats = table(*draw())
    ce = map_losses(*stats, lambda_ce=1.0, lambda_dice=0.0)
    dice = map_losses(*stats, lambda_ce=0.0, lambda_dice=1.0)
    torch.testing.assert_close(map_losses(*stats), 0.3 * ce + 0.7 * dice)
    torch.testing.assert_close(map_losses(*stats, lambda_ce=2.0, lambda_dice=5.0), 2 * ce + 5 * dice)


def test_a_perfect_prediction_costs_nothing() -> None:
    target = torch.randint(CLASSES, (2, 5, 7))
    logits = 100.0 * F.one_hot(target, CLASSES).movedim(-1, 1)
    assert map_losses(*table([logits], target)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch", [True, False])
def test_dice_of_one_sample_does_not_depend_on_batch(batch: bool) -> None:
    stats = table(*draw(batch=1))
    torch.testing.assert_close(map_losses(*stats, batch=batch), map_losses(*stats))


def test_batch_sums_differ_from_sample_means() -> None:
    logits, target = draw()
    target[1:] = 0
    stats = table(logits, target)
    assert (map_losses(*stats, batch=True) - map_losses(*stats, batch=False)).abs().min() > 1e-3


@pytest.mark.parametrize("smooth", [(1e-5, 1e-5), (0.0, 1e-5), (0.0, 0.0)])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_an_empty_batch_costs_nothing(batch: bool, background: bool, smooth: tuple[float, float]) -> None:
    logits = [torch.randn(0, CLASSES, 5, 7, requires_grad=True)]
    stats = table(logits, torch.zeros(0, 5, 7, dtype=torch.int64))
    loss = map_losses(*stats, batch=batch, include_background=background, smooth_nr=smooth[0], smooth_dr=smooth[1])
    assert loss.tolist() == [0.0]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.shape == logits[0].shape


def test_a_class_in_neither_prediction_nor_label_counts_as_perfect() -> None:
    logits, target = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    logits[:, 1] = -1e4
    assert map_losses(*table([logits], target), lambda_ce=0.0).item() == pytest.approx(0, abs=1e-6)


def test_total_is_the_weighted_sum_without_division() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25, 2.0])
    assert total_loss(losses, weights).item() == 7.0
    assert total_loss(losses.double(), weights).dtype == torch.float64


def test_functional_loss() -> None:
    logits, target = draw()
    plan = MixPlan.create(2, ("add", "mul"))
    weights = torch.rand(plan.num_maps, dtype=torch.float64, requires_grad=True)
    stats = map_stats(logits, target, plan)
    options = {"lambda_ce": 0.5, "lambda_dice": 0.25, "smooth_nr": 1.0, "smooth_dr": 2.0}
    options |= {"include_background": False, "batch": False}
    loss = lomix_loss(logits, target, weights, plan, **options)
    losses = map_losses(*stats, **options)
    torch.testing.assert_close(loss, (weights * losses).sum())
    (grad,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(grad, losses)


def test_loss_of_random_logits_is_near_what_chance_gives() -> None:
    """Zero logits: CE is log C, and s = 1/C everywhere."""
    target = torch.arange(CLASSES).repeat(9).view(1, 4, 9)
    loss = map_losses(*table([torch.zeros(1, CLASSES, 4, 9)], target))
    dice = 1 - (2 * 9 / CLASSES) / (36 / CLASSES**2 + 9)
    assert loss.item() == pytest.approx(0.3 * math.log(CLASSES) + 0.7 * dice, rel=1e-5)
