"""From statistics to losses: CE against torch's, Dice against a literal one, and every option of both."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lomix_fast import LoMixLoss, MixPlan, lomix_loss, map_stats
from lomix_fast.options import ce_class_weights, dice_class_weights
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("batch", [True, False])
def test_a_bad_sum_does_not_pass_for_nothing(batch: bool, bad: float) -> None:
    """A class in no label may have a NaN in P alone."""
    stats = torch.tensor([[[1.0, 2.0, 0.0, 3.0, bad]]])  # CE, I, P of two classes
    target_stats = torch.tensor([[4.0, 4.0, 0.0]])
    loss = map_losses(stats, target_stats, batch=batch)
    assert loss.isnan().all() == math.isnan(bad)
    assert map_losses(torch.zeros_like(stats), torch.zeros_like(target_stats), batch=batch).item() == 0


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


# Each option of `lomix_loss`: a value, and what else the criterion or the call needs for it to matter.
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lambda_ce": (0.9, {}),
    "lambda_dice": (0.2, {}),
    "smooth_nr": (1.0, {}),
    "smooth_dr": (1.0, {}),
    "include_background": (False, {}),
    "batch": (False, {}),
    "jaccard": (True, {}),
    "tversky": ((0.3, 0.7), {"squared_pred": False}),
    "absent_classes": ("exclude", {}),
    "weight": ([1, 2, 3, 4], {}),
    "ce_weight": ([1, 2, 3, 4], {}),
    "ce_per_sample": (True, {"weight_map": None}),
    "weighted_ce": (False, {"weight_map": None}),
    "ignore_index": (1, {}),
    "label_smoothing": (0.2, {}),
    "structure": (True, {"sigmoid": True, "num_classes": 1}),
    "mask": (torch.arange(3 * 5 * 7).view(3, 5, 7) % 3 > 0, {}),
    "weight_map": (None, {}),
}
NOT_OF_THE_RECIPE = {
    "impl",
    "stacked_dim",
    "cat_weight",
    "cat_bias",
    "awf_weight",
    "awf_bias",
}  # these raise when they go astray


def test_every_option_is_in_the_list() -> None:
    given = {name for name, p in signature(lomix_loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(OPTIONS) == given - NOT_OF_THE_RECIPE


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_function_is_that_of_the_criterion(name: str) -> None:
    """Loss and gradients equal those of the criterion with weights of 1, and the option makes a difference."""
    value, others = OPTIONS[name]
    pixels = torch.rand(3, 5, 7, dtype=torch.float64)
    call = {key: pixels for key in ("weight_map",) if key in others or key == name}
    options = {key: other for key, other in others.items() if key != "weight_map"}
    classes = options.pop("num_classes", CLASSES)
    if name == "mask":
        call["mask"] = value
    elif name != "weight_map":
        options[name] = value
    criterion = LoMixLoss(classes, 2, weighting="fixed", impl="eager", **options).double()
    logits = [torch.randn(3, classes, *n, dtype=torch.float64, requires_grad=True) for n in ((3, 4), (5, 7))]
    # Class 3 is absent, and no class as frequent as another.
    target = (torch.rand(3, 5, 7) < 0.6).long() * torch.randint(1, 3, (3, 5, 7)) if classes > 1 else pixels > 0.6
    options.pop("squared_pred", None), options.pop("sigmoid", None)  # the plan has them
    rows = criterion._awf_index.on(torch.device("cpu"))
    parameters = {
        "cat_weight": criterion.cat_weight,
        "cat_bias": criterion.cat_bias,
        "awf_weight": criterion.awf_weight[rows],
        "awf_bias": criterion.awf_bias[rows],
    }

    def loss(**given: Any) -> Tensor:
        weights = torch.ones(criterion.plan.num_maps)
        return lomix_loss(logits, target, weights, criterion.plan, impl="eager", **parameters, **given)

    found, expected = loss(**options, **call), criterion(logits, target, **call)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    leaves = [*logits, *criterion.parameters()]
    wanted = torch.autograd.grad(expected, leaves)
    for got, want in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    without = loss(**{key: given for key, given in {**options, **call}.items() if key != name})
    assert (without - found).abs() > 1e-5 * found.abs()


def test_sigmoids_of_many_classes_are_those_of_the_criterion() -> None:
    """Which the plan says; cross-entropy is then a mean over classes too."""
    logits, _ = draw()
    target = torch.rand(3, CLASSES, 5, 7) > 0.6
    criterion = LoMixLoss(CLASSES, 2, sigmoid=True, weighting="fixed", operators=("add",), order="coarse_to_fine")
    found = lomix_loss(logits, target, torch.ones(3), MixPlan.create(2, ("add",), sigmoid=True))
    torch.testing.assert_close(found, criterion(logits, target), rtol=1e-12, atol=0)


def test_the_backend_reaches_the_sums() -> None:
    logits, target = draw()
    with pytest.raises(ValueError, match="impl: got 'none'"):
        lomix_loss(logits, target, torch.ones(2), MixPlan.create(2, ()), impl="none")


class CopiesFromTheHost(TorchDispatchMode):
    """Counts tensors on the CPU that go into an operation on another device: what a call would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        outputs = [found] if isinstance(found, Tensor) else []
        self.count += any(x.device.type == "cpu" for x in tensors) and any(x.device.type != "cpu" for x in outputs)
        return found


@pytest.mark.parametrize("weight", [[1, 2, 3, 4], 0.5, (1.0, 2.0, 3.0, 4.0)], ids=["list", "number", "tuple"])
def test_numbers_as_class_weights_are_written_on_the_device(weight: Any) -> None:
    """A copy from the host would wait for the device; "meta" stands for any that is not the CPU."""
    device = torch.device("meta")
    with CopiesFromTheHost() as copies:
        assert dice_class_weights(weight, 4, True, device).device == device
        assert dice_class_weights([1, 2, 3], 4, False, device).device == device
        assert ce_class_weights([1, 2, 3, 4], 4, device).shape == (4,)
    assert copies.count == 0
    with CopiesFromTheHost() as copies:
        torch.ones(4).to(device)
    assert copies.count == 1


@pytest.mark.parametrize("name", ["weight", "ce_weight"])
def test_class_weights_of_another_device_are_refused(name: str) -> None:
    logits, target = draw()
    with pytest.raises(ValueError, match=f"^{name}: got device meta, expected cpu as the logits have"):
        lomix_loss(logits, target, torch.ones(2), MixPlan.create(2, ()), **{name: torch.ones(4, device="meta")})


def test_class_weights_of_a_compiled_function() -> None:
    logits, target = draw()
    plan = MixPlan.create(2, ())

    def loss() -> Tensor:
        options = {"weight": [1, 2, 3, 4], "ce_weight": (1.0, 2.0, 3.0, 4.0), "impl": "eager"}
        return lomix_loss(logits, target, torch.ones(2), plan, **options)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(), loss())


def test_loss_of_random_logits_is_near_what_chance_gives() -> None:
    """Zero logits: CE is log C, and s = 1/C everywhere."""
    target = torch.arange(CLASSES).repeat(9).view(1, 4, 9)
    loss = map_losses(*table([torch.zeros(1, CLASSES, 4, 9)], target))
    dice = 1 - (2 * 9 / CLASSES) / (36 / CLASSES**2 + 9)
    assert loss.item() == pytest.approx(0.3 * math.log(CLASSES) + 0.7 * dice, rel=1e-5)
