"""Derivatives that the fused passes do not have: refused with a message, never left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from common import NATIVE
from in_training import USES
from torch import Tensor
from torch.autograd import forward_ad

from lomix_fast import LoMixLoss, MixPlan, map_stats

backends = pytest.mark.parametrize("impl", NATIVE)
SIZES = ((2, 3), (4, 6), (6, 9))
SECOND = r"lomix_fast: got a second derivative .*expected first derivatives only"
TRANSFORM = r"lomix_fast: got a transform of torch\.func .*expected plain autograd.*functional_call works"


def loss_of(impl: str = "auto") -> tuple[LoMixLoss, Callable[..., Tensor], tuple[Tensor, ...]]:
    """A criterion, the loss as a function of three logits, and such logits without a gradient."""
    criterion, target = USES["as published"].criterion(impl), torch.randint(3, (2, 6, 9))
    logits = tuple(z.detach() for z in USES["as published"].logits(2, SIZES))
    return criterion, lambda *z: criterion(list(z), target), logits


def asking(logits: Sequence[Tensor]) -> list[Tensor]:
    return [z.clone().requires_grad_() for z in logits]


def penalty_of(gradients: Sequence[Tensor]) -> Tensor:
    return sum(g.square().sum() for g in gradients)


# Second derivatives ---------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("of", ["logits", "parameters"])
@pytest.mark.parametrize("together", [False, True], ids=["penalty", "loss and penalty"])
@pytest.mark.parametrize("by", ["backward", "grad"])
def test_a_penalty_on_gradients(by: str, together: bool, of: str, impl: str) -> None:
    """torch.autograd.grad visits only what leads to its inputs: an error beside that path would not be met, and the
    penalty would be left out without a word."""
    criterion, loss, logits = loss_of(impl)
    leaves = asking(logits)
    first = loss(*leaves)
    inputs = leaves if of == "logits" else [criterion.cat_weight, criterion.awf_weight]
    total = penalty_of(torch.autograd.grad(first, inputs, create_graph=True)) + (first if together else 0)
    with pytest.raises(RuntimeError, match=SECOND):
        total.backward() if by == "backward" else torch.autograd.grad(total, leaves)


@backends
def test_a_cotangent_that_asks_for_nothing(impl: str) -> None:
    """Of a sum of statistics the first gradient has a constant cotangent, and depends on the logits all the same."""
    logits = asking(loss_of()[2])
    stats, _ = map_stats(logits, torch.randint(3, (2, 6, 9)), MixPlan.create(3, ("add", "mul")), impl=impl)
    gradients = torch.autograd.grad(stats.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(penalty_of(gradients) + penalty_of(logits), logits)


def test_hessians_and_the_double_backward_trick() -> None:
    """Those of torch.autograd.functional would be 0 otherwise."""
    _, loss, logits = loss_of()
    for call in (torch.autograd.functional.hessian, lambda f, z: torch.autograd.functional.jvp(f, z, z)):
        with pytest.raises(RuntimeError, match=SECOND):
            call(loss, logits)


@backends
def test_what_needs_first_derivatives_alone_stays_so(impl: str) -> None:
    """dLoss/dalpha is sigmoid(alpha) times the losses of the maps, so its own gradients are first ones of theirs."""
    criterion = USES["as published"].criterion(impl)
    leaves, target = asking(loss_of()[2]), torch.randint(3, (2, 6, 9))
    (slope,) = torch.autograd.grad(criterion(leaves, target), criterion.alpha, create_graph=True)
    expected = criterion.alpha.sigmoid() * criterion.map_losses(leaves, target)
    torch.testing.assert_close(slope, expected)
    v, inputs = torch.randn_like(slope), [*leaves, *criterion.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, inputs, v) for x in (slope, expected)), strict=True):
        torch.testing.assert_close(a, b)


# Transforms -----------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, z: torch.func.grad(f)(*z),
    "vjp": lambda f, z: torch.func.vjp(f, *z),
    "jvp": lambda f, z: torch.func.jvp(f, z, z),
    "jacrev": lambda f, z: torch.func.jacrev(f)(*z),
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(*z),
    "hessian": lambda f, z: torch.func.hessian(f)(*z),
    "vmap": lambda f, z: torch.func.vmap(f)(*(x.expand(2, *x.shape) for x in z)),
    "linearize": lambda f, z: torch.func.linearize(f, *z),
    "grad of grad": lambda f, z: torch.func.grad(lambda *x: torch.func.grad(f)(*x).square().sum())(*z),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    _, loss, logits = loss_of()
    with pytest.raises(RuntimeError, match=TRANSFORM):
        TRANSFORMS[name](loss, logits)


@pytest.mark.parametrize("name", ["grad", "grad of grad", "vmap"])
def test_transforms_within_compiled_code(name: str) -> None:
    """Dynamo would trace them, and the second derivative would be 0."""
    torch._dynamo.reset()
    _, loss, logits = loss_of()
    with pytest.raises(RuntimeError, match=TRANSFORM):
        torch.compile(lambda *z: TRANSFORMS[name](loss, z), fullgraph=True, backend="aot_eager")(*logits)


def test_gradients_by_the_parameters() -> None:
    criterion, _, logits = loss_of()
    state = {name: p.detach() for name, p in criterion.named_parameters()}
    target = torch.randint(3, (2, 6, 9))
    with pytest.raises(RuntimeError, match=TRANSFORM):
        torch.func.grad(lambda s: torch.func.functional_call(criterion, s, (logits, target)))(state)


@pytest.mark.parametrize("where", ["logits", "cat_weight"])
def test_forward_mode(where: str) -> None:
    criterion, loss, logits = loss_of()
    with forward_ad.dual_level():
        loss(*logits)  # nothing here has a tangent
        if where == "logits":
            logits = (*logits[:2], forward_ad.make_dual(logits[2], torch.ones_like(logits[2])))
        else:
            weight = criterion.cat_weight.detach()
            del criterion.cat_weight
            criterion.cat_weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(RuntimeError, match=r"lomix_fast: got .*forward-mode AD, expected plain autograd"):
            loss(*logits)


def test_a_batch_of_cotangents() -> None:
    """torch.vmap over the backward pass alone, by either of its two ways."""
    _, loss, logits = loss_of()
    leaves = asking(logits)
    with pytest.raises(RuntimeError, match="lomix_fast"):
        torch.autograd.grad(loss(*leaves), leaves, torch.ones(2), is_grads_batched=True)
    first = loss(*leaves)
    with pytest.raises(RuntimeError, match=TRANSFORM):
        torch.vmap(lambda v: torch.autograd.grad(first, leaves, v, retain_graph=True))(torch.ones(2))


@backends
def test_functional_call_works(impl: str) -> None:
    criterion, _, logits = loss_of(impl)
    leaves, target = asking(logits), torch.randint(3, (2, 6, 9))
    state = {name: (0.5 * p).detach().requires_grad_() for name, p in criterion.named_parameters()}
    found = torch.func.functional_call(criterion, state, (leaves, target))
    gradients = torch.autograd.grad(found, [*leaves, *state.values()])
    with torch.no_grad():
        for p in criterion.parameters():
            p.mul_(0.5)
    expected = criterion(leaves, target)
    torch.testing.assert_close(found, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, [*leaves, *criterion.parameters()]), strict=True):
        torch.testing.assert_close(got, want)
