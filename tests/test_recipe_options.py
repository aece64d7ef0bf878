"""Options that no preset is about: cross-entropy of torch, weights of pixels and classes, absent classes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import NATIVE
from literal_torch import literal_map_losses
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss
from originals import EXACT, SIZES, WEIGHT, check, labels, last, shares
from torch import Tensor

from lomix_fast import LoMixLoss

backends = pytest.mark.parametrize("impl", NATIVE)

# Cross-entropy of torch ---------------------------------------------------------------------------------------------

CE: dict[str, dict[str, Any]] = {
    "weight": {"weight": WEIGHT},
    "ignore_index": {"ignore_index": 2},
    "ignore_index outside": {"ignore_index": 255},
    "label_smoothing": {"label_smoothing": 0.15},
    "all": {"weight": WEIGHT, "ignore_index": 255, "label_smoothing": 0.15},
}


@backends
@pytest.mark.parametrize("name", CE)
def test_cross_entropy_of_torch(name: str, impl: str) -> None:
    options = dict(CE[name])
    original = torch.nn.CrossEntropyLoss(**options)
    target = labels(4)
    if options.get("ignore_index") == 255:
        target[torch.rand(target.shape) > 0.7] = 255
    options["ce_weight"] = options.pop("weight", None)
    criterion = last(4, impl, lambda_ce=1.0, lambda_dice=0.0, **options)
    check(criterion, lambda z, y: original(z, y[:, 0]), target)


@backends
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"weight": WEIGHT, "label_smoothing": 0.15}], ids=str)
def test_cross_entropy_of_torch_with_soft_targets(options: dict[str, Any], impl: str) -> None:
    original = torch.nn.CrossEntropyLoss(**options)
    ours = {"ce_weight": options.get("weight"), "label_smoothing": options.get("label_smoothing", 0.0)}
    check(last(4, impl, lambda_ce=1.0, lambda_dice=0.0, **ours), original, shares(4))


@backends
def test_weight_map_is_a_weighted_mean(impl: str) -> None:
    weight = torch.rand(3, *SIZES[2][1], dtype=torch.float64)

    def original(z: Tensor, y: Tensor) -> Tensor:
        ce = F.cross_entropy(z, y[:, 0], reduction="none")
        s, hot = z.softmax(1), F.one_hot(y[:, 0], 4).movedim(-1, 1)
        i, p, g = ((weight.unsqueeze(1) * x).sum((0, 2, 3)) for x in (s * hot, s * s, hot))
        return 0.3 * (weight * ce).sum() / weight.sum() + 0.7 * (1 - (2 * i + 1e-5) / (p + g + 1e-5)).mean()

    for given in (weight, weight.unsqueeze(1)):
        check(last(4, impl), original, labels(4), weight_map=given)


@backends
def test_cross_entropy_per_sample(impl: str) -> None:
    """The mean of each sample's own weighted mean."""
    weight = torch.rand(3, *SIZES[2][1], dtype=torch.float64)

    def original(z: Tensor, y: Tensor) -> Tensor:
        ce = F.cross_entropy(z, y[:, 0], reduction="none")
        return ((weight * ce).sum((1, 2)) / weight.sum((1, 2))).mean()

    criterion = last(4, impl, lambda_ce=1.0, lambda_dice=0.0, ce_per_sample=True)
    check(criterion, original, labels(4), weight_map=weight)


@backends
@pytest.mark.parametrize("batch", [True, False])
def test_absent_classes_leave_the_mean(batch: bool, impl: str) -> None:
    """MONAI's Dice of each class, and a mean over those that are there."""
    target = labels(4)  # without class 3 in sample 0
    target[target == 2] = 1  # and without class 2 anywhere
    each = DiceLoss(softmax=True, to_onehot_y=True, batch=batch, reduction="none")

    def original(z: Tensor, y: Tensor) -> Tensor:
        dice = each(z, y).flatten(1)
        if batch:
            return dice.flatten()[[0, 1, 3]].mean()
        return torch.stack([dice[0, [0, 1]].mean(), dice[1, [0, 1, 3]].mean(), dice[2, [0, 1, 3]].mean()]).mean()

    check(last(4, impl, "monai", batch=batch, lambda_ce=0.0, absent_classes="exclude"), original, target)


def test_class_weights_belong_to_the_configuration_and_stay_out_of_checkpoints() -> None:
    criterion = LoMixLoss(3, 2, weight=[1, 2, 3], ce_weight=torch.tensor([1, 2, 3]))
    assert criterion.weight.tolist() == criterion.ce_weight.tolist() == [1, 2, 3]
    assert criterion.to("meta").ce_weight.tolist() == criterion.weight.tolist() == [1, 2, 3]
    assert not {"weight", "ce_weight"} & set(criterion.state_dict())


@backends
@pytest.mark.parametrize("kind", ["list", "tuple", "array", "numbers of NumPy", "float32"])
def test_class_weights_of_any_kind(kind: str, impl: str) -> None:
    """Numbers are kept in float64, so that float64 logits lose nothing."""
    tolerance = EXACT if kind != "float32" else {"rtol": 1e-6, "atol": 1e-8}
    weight = {
        "list": WEIGHT.tolist(),
        "tuple": tuple(WEIGHT.tolist()),
        "array": WEIGHT.numpy(),
        "numbers of NumPy": list(WEIGHT.numpy()),
        "float32": WEIGHT.float(),
    }[kind]
    original = torch.nn.CrossEntropyLoss(weight=WEIGHT)
    criterion = last(4, impl, lambda_ce=1.0, lambda_dice=0.0, ce_weight=weight)
    check(criterion, lambda z, y: original(z, y[:, 0]), labels(4), tolerance=tolerance)
    original = DiceLoss(softmax=True, to_onehot_y=True, weight=WEIGHT)
    check(last(4, impl, "monai", lambda_ce=0.0, weight=weight), original, labels(4), tolerance=tolerance)


def test_class_weights_of_numpy_integers() -> None:
    criterion = LoMixLoss(3, 2, weight=np.array([1, 2, 3]), ce_weight=[np.int64(1), np.float32(2), Fraction(3)])
    assert criterion.weight.tolist() == criterion.ce_weight.tolist() == [1, 2, 3]
    assert LoMixLoss(3, 2, weight=np.float32(0.5)).weight.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_weights_are_the_criterions_own(dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    criterion = LoMixLoss(3, 2, weight=MetaTensor(weight), ce_weight=weight)
    assert type(criterion.weight) is type(criterion.ce_weight) is Tensor
    weight.mul_(5)
    assert criterion.weight.tolist() == criterion.ce_weight.tolist() == [1, 2, 3]
    number = torch.tensor(2.0)
    criterion = LoMixLoss(3, 2, weight=number)
    number.mul_(5)
    assert criterion.weight.item() == 2


# Which maps ---------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("mul", ["logits", "bounded"])
def test_mixes_made_by_hand(mul: str, impl: str) -> None:
    """Three scales at full size: maps of the extra operators and of products, each given to MONAI's loss."""
    a, b, c = maps = [(2 * torch.randn(2, 3, 6, 7, dtype=torch.float64)).requires_grad_() for _ in range(3)]
    target = torch.randint(3, (2, 6, 7))
    f = [z / (1 + (z / 2) ** 2).sqrt() if mul == "bounded" else z for z in maps]
    expected = {
        **{f"orig_{i}": z for i, z in enumerate(maps)},
        "sub_0_2": a - c,
        "sub_0_1_2": a - b - c,
        "avg_1_2": (b + c) / 2,
        "avg_0_1_2": (a + b + c) / 3,
        "max_0_1": torch.maximum(a, b),
        "max_0_1_2": torch.maximum(torch.maximum(a, b), c),
        "mul_1_2": f[1] * f[2],
        "mul_0_1_2": f[0] * f[1] * f[2],
    }
    original = DiceCELoss(softmax=True, to_onehot_y=True)
    options = {"operators": ("sub", "avg", "max", "mul"), "mul": mul, "impl": impl, "order": "coarse_to_fine"}
    criterion = LoMixLoss.preset("monai", 3, 3, **options)
    losses = dict(zip(criterion.map_names, criterion.map_losses(maps, target), strict=True))
    assert len(losses) == 3 + 4 * 4 and set(expected) < set(losses)
    for name, z in expected.items():
        loss = original(z, target.unsqueeze(1))
        torch.testing.assert_close(losses[name], loss, rtol=1e-11, atol=0, msg=name)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        wanted = torch.autograd.grad(loss, maps, **options)
        for got, want in zip(torch.autograd.grad(losses[name], maps, **options), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13, msg=name)


PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
TRIPLES = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
CHOSEN: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "two at most": ({"max_subset_size": 2}, PAIRS),
    "three at most": ({"max_subset_size": 3}, PAIRS + TRIPLES),
    "pairs": ({"subsets": "pairs"}, PAIRS),
    "listed": ({"subsets": [(1, 2, 3), (0, 3)]}, [(0, 3), (1, 2, 3)]),
    "no pair": ({"subsets": [(0, 1, 2, 3), (0, 1, 3)]}, [(0, 1, 3), (0, 1, 2, 3)]),
}


@backends
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_subsets(name: str, impl: str) -> None:
    """Against all maps written out with torch, of which the chosen ones are taken by name."""
    options, subsets = CHOSEN[name]
    operators = ("add", "mul", "cat", "awf", "sub", "avg", "max")
    criterion = LoMixLoss(3, 4, operators=operators, weighting="fixed", impl=impl, **options).double()
    mixes = [(operator, *subset) for operator in operators for subset in subsets]
    names = [f"orig_{i}" for i in range(4)] + ["_".join(map(str, mix)) for mix in mixes]
    assert list(criterion.map_names) == names
    # Its parameters at the places that they have among those of all subsets; zero for the others.
    every = [*PAIRS, *TRIPLES, (0, 1, 2, 3)]
    pairs = [(subset, i) for subset in every for i in subset]
    steps = [(size, k) for size in (2, 3, 4) for k in range(size)]
    of_pair = [pairs.index((subset, i)) for subset in subsets for i in subset]
    of_step = [row for row, (size, _) in enumerate(steps) if size in {len(subset) for subset in subsets}]

    def spread(values: Tensor, rows: list[int], count: int) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_copy(0, torch.tensor(rows), values)

    parameters = {
        "cat_weight": spread(criterion.cat_weight, of_pair, len(pairs)),
        "cat_bias": spread(criterion.cat_bias, [every.index(subset) for subset in subsets], len(every)),
        "awf_weight": spread(criterion.awf_weight, of_step, len(steps)),
        "awf_bias": spread(criterion.awf_bias, of_step, len(steps)),
    }
    logits = [torch.randn(2, 3, n, n + 1, dtype=torch.float64, requires_grad=True) for n in (2, 3, 4, 8)]
    target = torch.randint(3, (2, 8, 9))
    literal = literal_map_losses(logits, target, operators, **parameters)
    expected = torch.stack([literal[one] for one in names])
    torch.testing.assert_close(criterion.map_losses(logits, target), expected, rtol=1e-10, atol=0)
    loss = criterion(logits, target)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-10, atol=0)
    leaves = [*logits, *criterion.parameters()]
    wanted = torch.autograd.grad(expected.sum(), leaves)
    for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


# Compiled -----------------------------------------------------------------------------------------------------------

COMPILED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ignored": ("official", 3, {"ignore_index": 255, "weighting": "normalized"}),
    "weighted": ("monai", 3, {"ce_weight": [1, 2, 3], "weight": [1, 2, 3], "weighting": "uncertainty"}),
    "smoothed": ("monai", 3, {"label_smoothing": 0.1, "tversky": (0.3, 0.7), "absent_classes": "exclude"}),
    "bounded": ("official", 3, {"mul": "bounded", "max_subset_size": 2}),
    "polyp": ("polyp", 1, {}),
    "polyp as released": ("polyp", 1, {"bce": "as_released"}),
    "regions": ("nnunet", 3, {"sigmoid": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    preset, classes, options = COMPILED[name]
    criterion = LoMixLoss.preset(preset, classes, 2, impl="eager", **options)
    logits = [torch.randn(2, classes, n, n, requires_grad=True) for n in (3, 6)]
    dense = criterion.recipe["sigmoid"]
    target = (torch.rand(2, classes, 6, 6) > 0.5).float() if dense else torch.randint(classes, (2, 6, 6))
    call = {"mask": torch.rand(2, 6, 6) > 0.3, "weight_map": torch.rand(2, 6, 6)}
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    leaves = [*logits, *criterion.parameters()]
    for given in ({}, call):
        loss, expected = compiled(logits, target, **given), criterion(logits, target, **given)
        torch.testing.assert_close(loss, expected)
        wanted = torch.autograd.grad(expected, leaves)
        for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("choice", [{"subsets": "pairs"}, {"max_subset_size": 3}, {"subsets": [(0, 7), (1, 2, 5)]}])
def test_checkpoints_follow_the_choice_of_subsets(choice: dict[str, Any]) -> None:
    """Names, counts and shapes are those of the chosen maps; what has another number of them is refused."""
    operators = ("add", "cat", "awf")
    saved, loaded = (LoMixLoss(2, 8, operators=operators, impl="eager", **choice) for _ in range(2))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.normal_()
    loaded.load_state_dict(saved.state_dict())
    subsets = len(saved.plan.subsets)
    assert saved.alpha is not None and saved.alpha.shape == (8 + 3 * subsets,) == (len(saved.map_names),)
    assert saved.cat_bias is not None and saved.cat_bias.shape == (subsets, 2)
    logits = [torch.randn(1, 2, n, n) for n in range(1, 9)]
    target = torch.randint(2, (1, 8, 8))
    assert torch.equal(loaded(logits, target), saved(logits, target))
    with pytest.raises(RuntimeError, match=r"with subsets=.* expected subsets=\[\[0, 1\]\]"):
        LoMixLoss(2, 8, operators=operators, subsets=[(0, 1)]).load_state_dict(saved.state_dict())
