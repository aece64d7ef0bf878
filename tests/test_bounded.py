"""The published product of logits runs away; mul="bounded" does not."""

from __future__ import annotations

import pytest
import torch
from common import NATIVE
from torch import Tensor

from lomix_fast import LoMixLoss

backends = pytest.mark.parametrize("impl", NATIVE)


@backends
def test_huge_logits_overflow_the_product_alone(impl: str) -> None:
    """Four factors of 1e10 are 1e40, past float32."""
    target = torch.randint(3, (1, 6, 6))
    right = 2e10 * (torch.nn.functional.one_hot(target, 3).movedim(-1, 1) - 0.5)
    logits = [right.clone().requires_grad_() for _ in range(4)]
    options = {"operators": ("mul",), "weighting": "fixed", "impl": impl, "order": "coarse_to_fine"}
    assert not LoMixLoss(3, 4, **options)(logits, target).isfinite()
    loss = LoMixLoss(3, 4, mul="bounded", **options)(logits, target)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, logits))


def train(mul: str, impl: str) -> tuple[list[float], Tensor]:
    """Losses of 40 steps of SGD on the logits of four scales, and how often their plain sum is right at the end."""
    torch.manual_seed(1)
    target = torch.randint(3, (2, 8, 8))
    right = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    logits = [(2 * torch.randn(2, 3, 8, 8) + right).requires_grad_() for _ in range(4)]
    criterion = LoMixLoss(3, 4, operators=("mul",), weighting="fixed", mul=mul, impl=impl, order="coarse_to_fine")
    optimizer = torch.optim.SGD(logits, lr=50.0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = criterion(logits, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (torch.stack(list(logits)).sum(0).argmax(1) == target).float().mean()


@backends
def test_descent_diverges_with_the_product_and_learns_with_the_bounded_one(impl: str) -> None:
    wild, _ = train("logits", impl)
    tame, accuracy = train("bounded", impl)
    assert not all(torch.tensor(wild).isfinite()) or max(wild) > 1e3 * wild[0]
    assert all(torch.tensor(tame).isfinite()) and max(tame) <= 1.01 * tame[0]
    assert tame[-1] < 0.1 * tame[0] and accuracy > 0.95
