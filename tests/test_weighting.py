"""The four weightings: where each takes the weights of maps whose losses are fixed, and what pruning leaves of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from common import NATIVE
from torch import Tensor

from lomix_fast import LoMixLoss
from lomix_fast.weighting import WEIGHTING, log_softplus, map_weights, weighted_total

LEARNED = [name for name in WEIGHTING if name != "fixed"]
# Four maps of constant loss, one of them useless: the toy of docs/recipes.md.
LOSSES = torch.tensor([0.25, 0.5, 1.0, 4.0], dtype=torch.float64)
YES = torch.tensor(True)
DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"


def descend(weighting: str, steps: int, momentum: float = 0.0, lr: float = 0.1) -> list[Tensor]:
    """Weights [4] before and after every step of SGD on alpha alone."""
    alpha = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([alpha], lr=lr, momentum=momentum, nesterov=momentum > 0)
    path = [map_weights(alpha, weighting).detach()]
    for _ in range(steps):
        optimizer.zero_grad()
        weighted_total(LOSSES, alpha, weighting, YES).backward()
        optimizer.step()
        path.append(map_weights(alpha, weighting).detach())
    return path


def test_softplus_falls_towards_zero_and_never_rises() -> None:
    path = torch.stack(descend("softplus", 2000))
    assert (path.diff(dim=0) < 0).all()
    assert path[-1].max() < 0.03


def test_normalized_keeps_the_total_and_moves_it_to_small_losses() -> None:
    path = torch.stack(descend("normalized", 2000))
    torch.testing.assert_close(path.sum(1), torch.full((2001,), 4.0, dtype=torch.float64))
    assert path[0].tolist() == [1.0] * 4
    assert (path[1:, :-1] > path[1:, 1:]).all()  # in the order of the losses
    assert path[-1, 0] > 3 and path[-1, 3] < 0.1


def test_uncertainty_comes_to_rest_at_one_over_the_loss() -> None:
    path = descend("uncertainty", 2000)
    torch.testing.assert_close(path[-1], 1 / LOSSES, rtol=1e-5, atol=0)
    torch.testing.assert_close(path[-1], path[-100], rtol=1e-5, atol=0)


def test_fixed_stays() -> None:
    criterion = LoMixLoss(3, 2, weighting="fixed", operators=("add",))
    assert criterion.alpha is None and list(criterion.parameters()) == []
    assert criterion.map_weights().tolist() == [1.0] * 3


def test_the_table_in_the_docs() -> None:
    """Weights after 50 steps of SGD with lr 0.01 and Nesterov momentum 0.99, nnU-Net's optimizer."""
    text = DOCS.read_text()
    for name in LEARNED:
        path = descend(name, 1000, momentum=0.99, lr=0.01)
        for steps in (50, 1000):
            cells = " | ".join(f"{w:.2g}" for w in path[steps].tolist())
            row = f"| {name} | {steps} | {cells} | {path[steps].sum():.2g} |"
            assert row in text, f"docs/recipes.md lacks the row\n{row}"


@pytest.mark.parametrize("value", [-1e4, -200.0, -36.001, -35.999, -5.0, 0.0, 5.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithm_of_the_weight(dtype: torch.dtype, value: float) -> None:
    """Finite where the weight itself is 0 in floating point, with the gradient of the exact function."""
    alpha = torch.tensor(value, dtype=dtype, requires_grad=True)
    found = log_softplus(alpha)
    (grad,) = torch.autograd.grad(found, alpha)
    exact = torch.tensor(value, dtype=torch.float64)
    weight = torch.log1p(exact.exp()) if value < 50 else exact
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    expected = weight.log().item() if value > -30 else value
    slope = (exact.sigmoid() / weight).item() if value > -30 else 1.0
    assert found.item() == pytest.approx(expected, rel=tolerance)
    assert grad.item() == pytest.approx(slope, rel=tolerance)


@pytest.mark.parametrize("value", [-20.0, -1000.0, 0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logarithm_of_the_weight_in_half_precision(dtype: torch.dtype, value: float) -> None:
    """softplus(-20) is 0 in float16, its logarithm -20."""
    alpha = torch.tensor(value, dtype=dtype, requires_grad=True)
    found = log_softplus(alpha)
    (grad,) = torch.autograd.grad(found, alpha)
    exact = value if value < -10 else math.log(math.log1p(math.exp(value)))
    assert found.dtype == dtype and found.item() == pytest.approx(exact, rel=5e-3)
    assert grad.isfinite() and grad > 0


@pytest.mark.parametrize("active", [None, [0, 2]])
@pytest.mark.parametrize("value", [-104.0, -500.0, 300.0])
def test_normalized_shares_of_nothing(value: float, active: list[int] | None) -> None:
    """Every softplus may be 0 in float32: equal alphas still have equal shares, and a larger one more."""
    numbers = None if active is None else torch.tensor(active)
    alpha = torch.full((4,), value, requires_grad=True)
    weights = map_weights(alpha, "normalized", numbers)
    assert weights.tolist() == [1.0] * (4 if active is None else 2)
    (grad,) = torch.autograd.grad(weights[0], alpha)
    assert grad.isfinite().all() and grad[0] > 0 and grad[2] < 0
    assert (grad[[1, 3]] == 0).all() == (active is not None)
    more = map_weights(torch.tensor([value, value + 1]), "normalized")
    if value < 0:
        torch.testing.assert_close(more[1] / more[0], torch.tensor(math.e))


def draw() -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (3, 6)]
    return logits, torch.randint(3, (2, 6, 6))


def by_hand(alpha: Tensor, weighting: str) -> Tensor:
    """The weights of the table in docs/recipes.md, from alpha [M]."""
    positive = torch.log1p(torch.exp(alpha))
    return len(alpha) * positive / positive.sum() if weighting == "normalized" else positive


@pytest.mark.parametrize("impl", NATIVE)
@pytest.mark.parametrize("weighting", WEIGHTING)
def test_the_criterion_adds_up_as_the_weighting_says(weighting: str, impl: str) -> None:
    criterion = LoMixLoss(3, 2, weighting=weighting, impl=impl).double()
    logits, target = draw()
    losses = criterion.map_losses(logits, target)
    if weighting == "fixed":
        expected = losses.sum()
    else:
        torch.nn.init.normal_(criterion.alpha)
        weights = by_hand(criterion.alpha, weighting)
        expected = (weights * losses).sum() - (weights.log().sum() if weighting == "uncertainty" else 0)
        torch.testing.assert_close(criterion.map_weights(), weights.detach(), rtol=1e-12, atol=0)
    found = criterion(logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    leaves = [*logits, *criterion.parameters()]
    wanted = torch.autograd.grad(expected, leaves)
    for got, want in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    if weighting == "fixed":
        return
    if weighting == "normalized":
        assert criterion.map_weights().sum().item() == pytest.approx(criterion.plan.num_maps)
    assert set(criterion.state_dict()) == set(LoMixLoss(3, 2).state_dict())


@pytest.mark.parametrize("weighting", LEARNED)
def test_pruned_maps_leave_nothing_behind(weighting: str) -> None:
    """Loss: the sum over the others, under the weights they had. Gradient: exactly zero for what was dropped."""
    options = {"weighting": weighting, "impl": "eager"}
    whole, pruned = LoMixLoss(3, 2, **options).double(), LoMixLoss(3, 2, prune_below=0.05, **options).double()
    torch.nn.init.uniform_(whole.alpha, -1, 1)
    with torch.no_grad():
        whole.alpha[[1, 4]] = -6.0
    pruned.load_state_dict(whole.state_dict())
    logits, target = draw()
    losses, weights = whole.map_losses(logits, target), by_hand(whole.alpha.detach(), weighting)
    loss = pruned(logits, target)
    assert pruned.dropped_maps == ("orig_1", "cat_0_1")
    kept = torch.tensor([0, 2, 3, 5])
    expected = (weights * losses)[kept].sum() - (weights.log()[kept].sum() if weighting == "uncertainty" else 0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(pruned.map_weights(), weights)
    (grad,) = torch.autograd.grad(loss, pruned.alpha)
    assert (grad[[1, 4]] == 0).all() and (grad[kept] != 0).all()
    # Of the kept ones it is that of a loss in which the dropped weights are constants.
    alpha = whole.alpha.detach().clone().requires_grad_()
    fixed = torch.where(torch.isin(torch.arange(6), kept), alpha, alpha.detach())
    weights = by_hand(fixed, weighting)
    total = (weights * losses.detach())[kept].sum()
    total = total - (weights.log().sum() if weighting == "uncertainty" else 0)
    (want,) = torch.autograd.grad(total, alpha)
    torch.testing.assert_close(grad[kept], want[kept])


def test_uncertainty_prunes_by_the_size_of_the_loss() -> None:
    """At rest a weight is 1 / loss, so prune_below=0.3 drops the map whose loss is 4."""
    weights = descend("uncertainty", 2000)[-1]
    criterion = LoMixLoss(3, 4, weighting="uncertainty", operators=(), prune_below=0.3).double()
    with torch.no_grad():
        criterion.alpha.copy_(torch.log(torch.expm1(weights)))
    assert criterion.update_pruning() == ("orig_3",)


@pytest.mark.parametrize("weighting", ["softplus", "normalized", "uncertainty"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision_have_weights_of_single_precision(dtype: torch.dtype, weighting: str) -> None:
    alpha = torch.tensor([-18.0, -3.0, 0.0, 0.3, 5.0], dtype=dtype)
    positive = np.log1p(np.exp(alpha.double().numpy()))
    expected = positive if weighting != "normalized" else len(alpha) * positive / positive.sum()
    found = map_weights(alpha, weighting)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5)
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    total = (expected * losses.numpy()).sum() - (np.log(positive).sum() if weighting == "uncertainty" else 0)
    assert weighted_total(losses, alpha, weighting, torch.tensor(True)).item() == pytest.approx(total, rel=1e-5)
