"""What a target and its weights may hold, on every backend: shares, marks, weights, ignored labels, extremes."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, NATIVE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lomix_fast import LoMixLoss, MixPlan, map_stats

backends = pytest.mark.parametrize("impl", BACKENDS)
ONE = MixPlan.create(1, ())
REGIONS = MixPlan.create(1, (), sigmoid=True)


def logits(*shape: int) -> list[Tensor]:
    return [torch.randn(shape)]


# ---- what is accepted, and what is refused ----


@backends
def test_masks_that_rounding_has_lifted_above_one_are_shares(impl: str) -> None:
    """Antialiased resizing of ones gives 1 + 2e-7."""
    target = torch.full((1, 1, 4, 4), 1 + 2.4e-7)
    target[0, 0, 0, 0] = -1e-9
    stats, _ = map_stats(logits(1, 1, 4, 4), target, REGIONS, impl=impl)
    assert stats.isfinite().all()


@backends
@pytest.mark.parametrize("value", [1.01, -0.01, torch.nan, 255.0])
def test_values_that_are_no_shares(value: float, impl: str) -> None:
    target = torch.zeros(1, 2, 3, 3)
    target[0, 1, 2, 0] = value
    with pytest.raises(ValueError, match=r"target: got the value .* at index \(0, 1, 2, 0\), expected shares"):
        map_stats(logits(1, 2, 3, 3), target, REGIONS, impl=impl)


@backends
@pytest.mark.parametrize("marks", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_marks_of_no_class_or_of_several_are_not_for_softmax(dtype: torch.dtype, marks: int, impl: str) -> None:
    """A forgotten sigmoid=True must not pass for soft labels."""
    target = torch.zeros(1, 3, 2, 2, dtype=dtype)
    target[:, 0] = 1
    assert map_stats(logits(1, 3, 2, 2), target, ONE, impl=impl)[1].tolist() == [[4, 4, 0, 0]]
    target[0, :, 1, 0] = torch.tensor([1, 1, 0] if marks else [0, 0, 0], dtype=dtype)
    with pytest.raises(ValueError, match=rf"target: got marks of {marks} classes at pixel \(0, 1, 0\).*sigmoid=True"):
        map_stats(logits(1, 3, 2, 2), target, ONE, impl=impl)


@backends
def test_weights_below_zero_are_refused(impl: str) -> None:
    weights = torch.ones(1, 2, 2)
    weights[0, 1, 1] = -0.5
    with pytest.raises(ValueError, match=r"weight_map: got the weight -0.5 at index \(0, 1, 1\), expected at least 0"):
        map_stats(logits(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), ONE, weight_map=weights, impl=impl)


@pytest.mark.parametrize("dtype, label", [(torch.bfloat16, 999), (torch.float16, 2049), (torch.float32, 2**24 + 1)])
def test_an_ignored_label_that_a_float_rounds_is_refused(dtype: torch.dtype, label: int) -> None:
    with pytest.raises(ValueError, match=f"ignore_index: got {label} with a target of .*, expected a number it holds"):
        map_stats(logits(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=dtype), REGIONS, ignore_index=label)
    kept = map_stats(logits(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=dtype), REGIONS, ignore_index=-(2**10))
    assert kept[0].isfinite().all()


@backends
def test_a_bool_target_has_no_room_for_an_ignored_label_and_so_ignores_none(impl: str) -> None:
    target = torch.tensor([[[[True, False]]]])
    z = logits(1, 1, 1, 2)
    plain = map_stats(z, target, REGIONS, impl=impl)
    for found, expected in zip(map_stats(z, target, REGIONS, ignore_index=255, impl=impl), plain, strict=True):
        assert torch.equal(found, expected)


# ---- what weights do to values that are extreme ----


@backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "ignore"])
def test_a_bad_logit_at_a_pixel_without_weight_shows_where_it_does_in_plain_pytorch(
    kind: str, value: float, impl: str
) -> None:
    z = logits(1, 2, 2, 2)
    z[0][0, 0, 1, 1] = value
    weights = torch.ones(1, 2, 2, dtype=torch.bool)
    weights[0, 1, 1] = False
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    options: dict = {"weight_map": weights}
    plan = ONE
    if kind == "sigmoid":
        target, plan = torch.zeros(1, 2, 2, 2, dtype=torch.bool), REGIONS
    elif kind == "ignore":
        target[0, 1, 1] = 255
        options = {"ignore_index": 255}
    found, expected = (map_stats(z, target, plan, **options, impl=which)[0] for which in (impl, "reference"))
    assert torch.equal(found.isfinite(), expected.isfinite())


@backends
def test_an_ignored_pixel_takes_no_part_though_its_weight_is_no_number(impl: str) -> None:
    target = torch.tensor([[[0, 255]]])
    weights = torch.tensor([[[0.5, torch.nan]]])
    stats, counts = map_stats(logits(1, 2, 1, 2), target, ONE, weight_map=weights, ignore_index=255, impl=impl)
    assert stats.isfinite().all() and counts.tolist() == [[0.5, 0.5, 0.0]]


@backends
@pytest.mark.parametrize("large", [1e4, 1e6, 1e8, 1e30])
def test_confident_regions_do_not_round_away_the_others(large: float, impl: str) -> None:
    """max(x, 0) - y x of a sure and right pixel is 0, not the difference of two numbers of that size."""
    values = torch.randn(1, 1, 64, 64)
    target = torch.rand(1, 1, 64, 64) < 0.5
    sure = torch.rand(1, 1, 64, 64) < 0.5
    values = torch.where(sure, torch.where(target, large, -large), values)
    stats, _ = map_stats([values], target, REGIONS, impl=impl)
    expected, _ = map_stats([values.double()], target, REGIONS, impl="reference")
    torch.testing.assert_close(stats[0, 0, 0].double(), expected[0, 0, 0], rtol=1e-5, atol=0)


@backends
@pytest.mark.parametrize("large", [1e10, 1e20, 3e38, -1e20])
def test_bounded_products_of_any_finite_logits(large: float, impl: str) -> None:
    z = [torch.randn(1, 3, 1, 2) for _ in range(2)]
    z[0][0, 0, 0, 0] = large
    z = [one.requires_grad_() for one in z]
    exact = [one.detach().double().requires_grad_() for one in z]
    target, plan = torch.zeros(1, 1, 2, dtype=torch.int64), MixPlan.create(2, ("mul",), (), bounded=True)
    found = []
    for which, values in ((impl, z), ("reference", exact)):
        stats, _ = map_stats(values, target, plan, impl=which)
        found.append((stats, *torch.autograd.grad(stats[:, :, 0].sum(), values)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@backends
def test_the_first_nan_takes_the_gradient_of_a_maximum(impl: str) -> None:
    z = [torch.tensor([torch.nan, 0.0]).view(1, 2, 1, 1), torch.ones(1, 2, 1, 1)]
    z = [one.requires_grad_() for one in z]
    plan = MixPlan.create(2, ("max",), (), sigmoid=True)
    stats, _ = map_stats(z, torch.ones(1, 2, 1, 1, dtype=torch.bool), plan, impl=impl)
    first, second = torch.autograd.grad(stats[:, :, 0].sum(), z)
    assert first[0, 0].isnan().all() and first[0, 1] == 0
    assert second[0, 0] == 0 and second[0, 1].isfinite().all() and second[0, 1] != 0


# ---- under torch.compile ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "regions", "polyp"])
@pytest.mark.parametrize("impl", NATIVE)
def test_one_compilation_serves_every_size_of_a_dense_target(kind: str, impl: str) -> None:
    torch._dynamo.reset()
    criterion = {
        "soft": lambda: LoMixLoss(3, 2, impl=impl),
        "regions": lambda: LoMixLoss(3, 2, sigmoid=True, impl=impl),
        "polyp": lambda: LoMixLoss.preset("polyp", 1, 2, impl=impl),
    }[kind]()
    classes = criterion.num_classes
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=counter)
    for batch, size in ((2, 8), (3, 8), (4, 12), (5, 10)):
        z = [torch.randn(batch, classes, n, n, requires_grad=True) for n in (size // 2, size)]
        target = torch.rand(batch, classes, size, size).softmax(1)
        torch.testing.assert_close(compiled(z, target), criterion(z, target))
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", NATIVE)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8])
def test_a_dense_target_of_another_type_counts_as_its_values(dtype: torch.dtype, sigmoid: bool, impl: str) -> None:
    logits = [torch.randn(2, 3, n, n, requires_grad=True) for n in (2, 4)]
    target = torch.nn.functional.one_hot(torch.randint(3, (2, 4, 4)), 3).movedim(-1, 1).float()
    criterion = LoMixLoss(3, 2, operators=("add", "mul", "cat", "awf", "sub", "avg", "max"), sigmoid=sigmoid, impl=impl)
    leaves = [*logits, *criterion.parameters()]
    found, right = criterion(logits, target.to(dtype)), criterion(logits, target)
    torch.testing.assert_close(found, right)
    for got, want in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
