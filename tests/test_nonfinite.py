"""Non-finite logits must show in the loss and in the gradient: GradScaler relies on it."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS

from lomix_fast import LoMixLoss, MixPlan, map_stats
from lomix_fast.testing.cases import case, make_inputs

backends = pytest.mark.parametrize("impl", BACKENDS)
NAN, INF = float("nan"), float("inf")


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("scale", [0, 1])
def test_one_bad_logit_spoils_loss_and_gradient(scale: int, value: float, dtype: torch.dtype, impl: str) -> None:
    logits = [torch.randn(2, 3, *n).to(dtype) for n in ((3, 4), (6, 8))]
    logits[scale][1, 2, 1, 1] = value
    logits = [z.requires_grad_() for z in logits]
    criterion = LoMixLoss(3, 2, impl=impl)
    loss = criterion(logits, torch.randint(3, (2, 6, 8)))
    loss.backward()
    assert not loss.isfinite()
    assert not all(z.grad.isfinite().all() for z in logits)
    assert not criterion.alpha.grad.isfinite().all()


@backends
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["only_add", "only_mul", "only_cat", "only_awf", "finest_only", "volume"])
def test_every_map_that_sees_a_bad_logit_is_bad(name: str, value: float, impl: str) -> None:
    """Map by map: bad where plain PyTorch says so, and the other sample as if nothing had happened."""
    one = case(name)
    inputs = make_inputs(one)
    clean, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    inputs.logits[-1][1, 0].view(-1)[3] = value
    stats, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl=impl)
    plain, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.parameters, impl="reference")
    bad = ~plain.isfinite().all(2)
    assert bad[1].any() and not bad[0].any()
    assert torch.equal(~stats.isfinite().all(2), bad)
    assert torch.equal(stats[:, :, 0].isfinite(), plain[:, :, 0].isfinite())  # CE for itself
    torch.testing.assert_close(stats[0], clean[0], rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, -1, 0x7F800001])
@pytest.mark.parametrize("label", [0, 1])
def test_a_nan_of_any_bits_shows(label: int, bits: int, impl: str) -> None:
    """Fresh memory filled with ones is a NaN too, and no arithmetic on bits may turn it into a number."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    logits = [torch.cat([nan, torch.tensor([0.0, 1.0])]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone() for _ in range(2)]
    logits = [z.requires_grad_() for z in logits]
    plan = MixPlan.create(2, ("add", "mul"))
    stats, _ = map_stats(logits, torch.full((1, 2, 2), label), plan, impl=impl)
    assert not stats.isfinite().any(2).any()
    for m in range(plan.num_maps):
        weight = torch.zeros_like(stats)
        weight[:, m] = 1
        found = torch.autograd.grad(stats, logits, weight, retain_graph=True)
        assert not all(g.isfinite().all() for g in found)


@backends
def test_contradicting_scales_with_an_infinite_logit_of_another_class(impl: str) -> None:
    """Where plain PyTorch stays finite so does every backend: log(2), for class 0 has no part in it."""
    logits = [torch.tensor(v).view(1, 3, 1, 1) for v in ([-INF, 0.0, 200.0], [-INF, 200.0, 0.0])]
    stats, _ = map_stats(logits, torch.ones(1, 1, 1, dtype=torch.int64), MixPlan.create(2, ("add",), ()), impl=impl)
    torch.testing.assert_close(stats[0, 0, 0].item(), 0.6931472, rtol=1e-6, atol=0)


@backends
def test_a_product_past_the_range_is_not_finite(impl: str) -> None:
    logits = [torch.randn(1, 3, 4, 4) * 1e30 for _ in range(2)]
    target = torch.randint(3, (1, 4, 4))
    stats, _ = map_stats(logits, target, MixPlan.create(2, ("mul",), originals=()), impl=impl)
    assert not stats[0, 0, 0].isfinite()


@backends
@pytest.mark.parametrize("grad", [NAN, INF])
def test_a_bad_grad_of_the_loss_reaches_the_logits(grad: float, impl: str) -> None:
    """GradScaler may overflow after the loss; the gradient must not come back clean."""
    inputs = make_inputs(case("non_integer")).requires_grad_()
    stats, _ = map_stats(inputs.logits, inputs.target, case("non_integer").plan, **inputs.parameters, impl=impl)
    found = torch.autograd.grad(stats, inputs.logits, torch.full_like(stats, grad))
    assert all(not g.isfinite().any() for g in found)


@backends
@pytest.mark.parametrize("supervision", ["last_layer", "deep_supervision", "mutation"])
def test_a_bad_logit_shows_in_every_mode(supervision: str, impl: str) -> None:
    logits = [torch.randn(1, 3, n, n) for n in (2, 4)]
    logits[-1][0, 1, 2, 3] = NAN
    loss = LoMixLoss(3, 2, supervision=supervision, impl=impl)(logits, torch.randint(3, (1, 4, 4)))
    assert loss.isnan()


RECIPES = [
    "sigmoid_bool",
    "sigmoid_masked",
    "sigmoid_one_class",
    "sigmoid_extra",
    "weight_map",
    "label_smoothing",
    "soft_labels",
    "only_sub",
    "only_avg",
    "only_max",
    "only_bounded_mul",
]


@backends
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", RECIPES)
def test_one_bad_logit_spoils_every_recipe(name: str, value: float, impl: str) -> None:
    """Bad where plain PyTorch is, loss and gradient, map by map, and the other sample as if nothing had happened."""
    one = case(name)
    inputs = make_inputs(one)
    clean, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.arguments(one), impl=impl)
    if inputs.weight_map is not None:
        inputs.weight_map[1] = 1  # the pixel counts
    inputs.logits[-1][1, 0].view(-1)[3] = value
    inputs.requires_grad_()
    found = []
    for which in (impl, "reference"):
        stats, _ = map_stats(inputs.logits, inputs.target, one.plan, **inputs.arguments(one), impl=which)
        (gradient,) = torch.autograd.grad(stats.sum(), inputs.logits[-1])
        found.append((stats, ~stats.isfinite().all(2), gradient.isfinite().flatten(1).all(1)))
    (stats, bad, good_gradient), (_, plain_bad, plain_good_gradient) = found
    assert torch.equal(bad, plain_bad) and torch.equal(good_gradient, plain_good_gradient)
    assert bad[1].any() or (value == -INF or name == "only_sub"), "minus infinity may be a class that is ruled out"
    assert not bad[0].any() and good_gradient[0]
    torch.testing.assert_close(stats[0], clean[0], rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("operators", [(), ("add",)])
@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 255},
        {"weight_map": torch.full((1, 1, 1), 1.0)},
        {"ce_weight": torch.tensor([1.0, 1.0, 1.0])},
        {"soft": True},
    ],
    ids=["ignore_index", "weight_map", "ce_weight", "soft"],
)
def test_an_infinite_logit_of_a_class_nobody_asks_for(options: dict, operators: tuple[str, ...], impl: str) -> None:
    """Users rule classes out with minus infinity; PyTorch's cross-entropy of the others is finite, and so is ours."""
    options = dict(options)
    target = torch.ones(1, 1, 1, dtype=torch.int64)
    if options.pop("soft", False):
        target = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    logits = [torch.tensor(v).view(1, 3, 1, 1) for v in ([-INF, 0.0, 200.0], [-INF, 200.0, 0.0])]
    logits = [z.requires_grad_() for z in logits]
    plan = MixPlan.create(2, operators, () if operators else None)
    stats, _ = map_stats(logits, target, plan, **options, impl=impl)
    expected = [0.6931472] if operators else [200.0, 0.0]
    torch.testing.assert_close(stats[0, :, 0].tolist(), expected, rtol=1e-6, atol=1e-6)
