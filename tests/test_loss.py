"""LoMixLoss as a user holds it: parameters, names, weights, orders, targets."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from common import BACKENDS
from torch import Tensor, nn

from lomix_fast import LoMixLoss, map_stats
from lomix_fast.recipe import map_losses

SIZES = [(2, 3), (4, 6), (8, 12)]


def draw(classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(2, classes, *n).to(dtype).requires_grad_() for n in SIZES]
    return logits, torch.randint(classes, (2, 8, 12))


# Parameters of each configuration at C=5, L=3: M=19, K=9, S=4, 5 rows of awf_weight for (size, position).
CAT = {"cat_weight": (9, 5, 5), "cat_bias": (4, 5)}
AWF = {"awf_weight": (5, 5), "awf_bias": (5,)}
STATE = [
    ({}, {"alpha": (19,), **CAT, **AWF}),
    ({"supervision": "mutation"}, {}),
    ({"supervision": "deep_supervision"}, {}),
    ({"supervision": "last_layer"}, {}),
    ({"weighting": "fixed"}, {**CAT, **AWF}),
    ({"concat": "resampled"}, {"alpha": (19,), **AWF}),
    ({"concat": "resampled", "weighting": "fixed", "operators": ("cat",)}, {}),
    ({"awf_sharing": "subset"}, {"alpha": (19,), **CAT, "awf_weight": (9, 5), "awf_bias": (9,)}),
    ({"awf_sharing": "scale"}, {"alpha": (19,), **CAT, "awf_weight": (3, 5), "awf_bias": (3,)}),
    ({"operators": ()}, {"alpha": (3,)}),
    ({"operators": ("add", "mul")}, {"alpha": (11,)}),
    ({"operators": ["cat"]}, {"alpha": (7,), **CAT}),
    ({"operators": ("awf",), "order": "fine_to_coarse"}, {"alpha": (7,), **AWF}),
]


@pytest.mark.parametrize(("options", "expected"), STATE, ids=lambda x: str(x) if "alpha" not in x else "")
def test_state_dict_holds_what_the_mode_uses_and_nothing_else(options: dict, expected: dict) -> None:
    criterion = LoMixLoss(5, 3, **options)
    state = criterion.state_dict()
    assert state.pop("_extra_state").dtype == torch.uint8  # the description, see test_checkpoint.py
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert set(state) == {name for name, _ in criterion.named_parameters()}


@pytest.mark.parametrize(("options", "expected"), STATE, ids=lambda x: str(x) if "alpha" not in x else "")
@pytest.mark.parametrize("impl", BACKENDS)
def test_every_parameter_gets_a_gradient(impl: str, options: dict, expected: dict) -> None:
    """DistributedDataParallel stops at the first parameter that takes no part."""
    criterion = LoMixLoss(5, 3, impl=impl, **options)
    logits, target = draw(5)
    criterion(logits[::-1] if criterion.order == "fine_to_coarse" else logits, target).backward()
    for name, parameter in criterion.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        # Every entry matters, but one attention row in a pair of scores may be shifted freely.
        assert (parameter.grad != 0).float().mean() > 0.5, name


@pytest.mark.parametrize("scales", range(1, 7))
def test_awf_rows_by_size_and_position(scales: int) -> None:
    criterion = LoMixLoss(3, scales, operators=("awf",))
    rows = 0 if criterion.awf_weight is None else criterion.awf_weight.shape[0]
    assert rows == scales * (scales + 1) // 2 - 1


def test_parameters_start_as_torch_starts_a_1x1_convolution() -> None:
    criterion = LoMixLoss(64, 4, awf_sharing="subset")
    k = 0
    for s, subset in enumerate(criterion.plan.subsets):
        bound = (len(subset) * 64) ** -0.5
        weights = criterion.cat_weight.detach()[k : k + len(subset)]
        assert 0.99 * bound < weights.abs().max() <= bound
        assert weights.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert 0.8 * bound < criterion.cat_bias.detach()[s].abs().max() <= bound
        k += len(subset)
    for values in (criterion.awf_weight.detach(), criterion.awf_bias.detach()):
        assert 0.8 / 8 < values.abs().max() <= 1 / 8
    assert (criterion.alpha == 0).all()


def test_construction_repeats_under_manual_seed() -> None:
    twins = []
    for _ in range(2):
        torch.manual_seed(5)
        twins.append(LoMixLoss(3, 3).state_dict())
    assert all(torch.equal(twins[0][name], twins[1][name]) for name in twins[0])
    assert not torch.equal(LoMixLoss(3, 3).cat_weight, twins[0]["cat_weight"])


def test_map_names() -> None:
    assert LoMixLoss(3, 2).map_names == ("orig_0", "orig_1", "add_0_1", "mul_0_1", "cat_0_1", "awf_0_1")
    assert LoMixLoss(3, 2, supervision="last_layer").map_names == ("orig_1",)
    assert LoMixLoss(3, 3, supervision="deep_supervision").map_names == ("orig_0", "orig_1", "orig_2")
    assert len(LoMixLoss(3, 4, supervision="mutation").map_names) == 15


@pytest.mark.parametrize("supervision", ["lomix", "mutation", "deep_supervision", "last_layer"])
def test_total_is_the_weighted_sum_of_map_losses(supervision: str) -> None:
    criterion = LoMixLoss(3, 3, supervision=supervision)
    if criterion.alpha is not None:
        torch.nn.init.normal_(criterion.alpha)
    logits, target = draw()
    losses, weights = criterion.map_losses(logits, target), criterion.map_weights()
    assert losses.shape == weights.shape == (len(criterion.map_names),)
    assert not weights.requires_grad and losses.requires_grad
    torch.testing.assert_close(criterion(logits, target), (losses * weights).sum())
    if supervision != "lomix":
        assert (weights == 1).all()


def test_map_weights_follow_alpha() -> None:
    criterion = LoMixLoss(3, 2)
    assert criterion.map_weights().tolist() == pytest.approx([0.6931472] * 6)
    with torch.no_grad():
        criterion.alpha[3] = -30.0
        criterion.alpha[4] = 30.0
    weights = criterion.map_weights()
    assert 0 < weights[3] < 1e-12 and weights[4].item() == pytest.approx(30.0)


def test_gradient_of_alpha_is_sigmoid_times_loss() -> None:
    criterion = LoMixLoss(3, 3)
    torch.nn.init.normal_(criterion.alpha)
    logits, target = draw()
    criterion(logits, target).backward()
    losses = criterion.map_losses(logits, target).detach()
    torch.testing.assert_close(criterion.alpha.grad, criterion.alpha.detach().sigmoid() * losses)
    assert (criterion.alpha.grad > 0).all()


@pytest.mark.parametrize("supervision", ["lomix", "mutation", "deep_supervision", "last_layer"])
def test_the_other_order_is_the_reversed_list_under_the_same_state(supervision: str) -> None:
    logits, target = draw()
    coarse = LoMixLoss(3, 3, supervision=supervision)
    fine = LoMixLoss(3, 3, supervision=supervision, order="fine_to_coarse")
    for parameter in coarse.parameters():
        torch.nn.init.normal_(parameter)
    fine.load_state_dict(coarse.state_dict())
    assert fine.map_names == coarse.map_names
    reverse = list(reversed(logits))
    assert torch.equal(fine(reverse, target), coarse(logits, target))
    assert torch.equal(fine.map_losses(reverse, target), coarse.map_losses(logits, target))
    (a,) = torch.autograd.grad(fine(reverse, target), logits[-1])
    (b,) = torch.autograd.grad(coarse(logits, target), logits[-1])
    assert torch.equal(a, b)


def test_full_size_logits_fit_either_order_but_do_not_mean_the_same() -> None:
    logits = [torch.randn(1, 3, 6, 6) for _ in range(2)]
    target = torch.randint(3, (1, 6, 6))
    last = LoMixLoss(3, 2, supervision="last_layer", order="coarse_to_fine")(logits, target)
    first = LoMixLoss(3, 2, supervision="last_layer", order="fine_to_coarse")(logits, target)
    torch.testing.assert_close(last, map_losses(*map_stats(logits[1:], target, LoMixLoss(3, 1, operators=()).plan))[0])
    torch.testing.assert_close(first, map_losses(*map_stats(logits[:1], target, LoMixLoss(3, 1, operators=()).plan))[0])
    assert first != last


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("native", [(4, 6), (8, 12)])
def test_a_single_tensor_degrades_to_the_base_loss(native: tuple[int, int], impl: str) -> None:
    _, target = draw()
    logits = torch.randn(2, 3, *native, requires_grad=True)
    options = {
        "lambda_ce": 0.2,
        "squared_pred": False,
        "include_background": False,
        "batch": False,
        "smooth_nr": 1.0,
    }
    criterion = LoMixLoss(3, 3, impl=impl, **options)
    base = LoMixLoss(3, 1, supervision="last_layer", impl=impl, **options)
    loss = criterion(logits, target)
    assert loss.shape == () and torch.equal(loss, base([logits], target))
    assert torch.autograd.grad(loss, logits)[0].abs().min() > 0


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_tuple_of_logits_and_a_target_with_a_channel(impl: str) -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 3, impl=impl)
    expected = criterion(logits, target)
    assert torch.equal(criterion(tuple(logits), target.unsqueeze(1)), expected)


@pytest.mark.parametrize("impl", BACKENDS)
def test_any_integer_dtype_of_labels(impl: str) -> None:
    logits, target = draw()
    criterion = LoMixLoss(3, 3, impl=impl)
    expected = criterion(logits, target)
    integers = "uint8 int8 int16 int32 uint16 uint32 uint64"
    for dtype in (*(getattr(torch, name) for name in integers.split()), torch.float32, torch.float16):
        assert torch.equal(criterion(logits, target.to(dtype)), expected), dtype
    two = LoMixLoss(2, 3, impl=impl)
    halves = [z[:, :2] for z in logits]
    assert torch.equal(two(halves, target > 0), two(halves, (target > 0).long()))


def test_smoothing_and_term_weights_reach_the_recipe() -> None:
    logits, target = draw()
    options = {
        "lambda_ce": 0.9,
        "lambda_dice": 0.4,
        "smooth_nr": 2.0,
        "smooth_dr": 3.0,
        "include_background": False,
    }
    options["batch"] = False
    for squared in (True, False):
        criterion = LoMixLoss(3, 3, operators=("add",), squared_pred=squared, **options)
        plan = criterion.plan
        assert plan.squared is squared
        torch.testing.assert_close(
            criterion.map_losses(logits, target), map_losses(*map_stats(logits, target, plan), **options)
        )


def test_repr_says_what_it_is() -> None:
    text = repr(LoMixLoss(5, 3, order="fine_to_coarse"))
    for part in ("num_classes=5", "num_scales=3", "maps=19", "fine_to_coarse"):
        assert part in text
    assert "lambda_ce" not in text  # what is as by default is left out
    text = repr(LoMixLoss(3, 2, lambda_ce=0.0, sigmoid=True, squared_pred=False, mul="bounded"))
    assert text.endswith("lambda_ce=0.0, sigmoid=True, squared_pred=False, mul='bounded')")
    text = repr(LoMixLoss(3, 3, subsets="pairs", weight=[1, 2, 3], ce_weight=torch.tensor([0.5, 1, 2])))
    assert text.endswith("subsets='pairs', weight=[1.0, 2.0, 3.0], ce_weight=[0.5, 1.0, 2.0])")
    assert repr(LoMixLoss(3, 3, max_subset_size=2, weight=0.5)).endswith("max_subset_size=2, weight=0.5)")
    assert "ce_weight=[1.0, 2.0, 3.0]" in repr(LoMixLoss(3, 3, ce_weight=[1, 2, 3]).to("meta"))


@pytest.mark.parametrize("options", [{"weight": [1, 2, 3]}, {"ce_weight": [1, 2, 3]}, {}], ids=str)
def test_logits_elsewhere_are_refused_in_a_list_and_alone(options: dict) -> None:
    criterion = LoMixLoss(3, 2, **options).to("meta")
    logits = [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 8, 8)]
    for given in (logits, logits[-1]):
        with pytest.raises(ValueError, match=r"^LoMixLoss: got parameters on the meta device.*\(alpha, .*to_empty"):
            criterion(given, torch.zeros(1, 8, 8, dtype=torch.int64))


# Changed afterwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("lambda_ce", 1.0), ("weighting", "fixed"), ("order", "coarse-to-fine"), ("structure", True), ("num_classes", 4)],
)
def test_options_are_fixed_once_a_criterion_is_made(name: str, value: object) -> None:
    criterion = LoMixLoss(3, 2)
    for one in (criterion, copy.deepcopy(criterion)):
        with pytest.raises(AttributeError, match=rf"{name}: got {value!r} .* fixed; make a new one with LoMixLoss"):
            setattr(one, name, value)
    criterion.impl = "reference"
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        criterion.impl = "fast"
    assert criterion.impl == "reference"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("alpha", (6, 1)), ("alpha", (1,)), ("awf_weight", (1, 3)), ("awf_weight", (4, 3)), ("awf_bias", (1,))],
)
def test_parameters_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    criterion = LoMixLoss(3, 2)
    expected = tuple(getattr(criterion, name).shape)
    setattr(criterion, name, nn.Parameter(torch.zeros(shape)))
    logits = [torch.randn(1, 3, n, n) for n in (2, 4)]
    with pytest.raises(ValueError, match=re.escape(f"{name}: got shape {shape}, expected {expected}")):
        criterion(logits, torch.zeros(1, 4, 4, dtype=torch.long))
