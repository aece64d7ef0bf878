"""Parameters of the loss that reach the optimizer, and the warning where they do not."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lomix_fast import DecayedLossWarning, LoMixLoss, UntrainedLossWarning, trained, with_loss


@pytest.fixture(autouse=True)
def _no_others() -> None:
    """Criteria of other tests in this process, which an optimizer's step is told to as well."""
    trained._undecided.clear()


def step(criterion: nn.Module) -> None:
    """One forward and backward pass."""
    logits = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)]
    criterion(logits, torch.randint(3, (2, 8, 8))).backward()


@contextmanager
def silence() -> Iterator[None]:
    """A warning inside is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedLossWarning)
        warnings.simplefilter("error", DecayedLossWarning)
        yield


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# Groups -----------------------------------------------------------------------------------------------------------


def test_groups_hold_every_parameter_and_no_decay() -> None:
    criterion = LoMixLoss(3, 2)
    (group,) = criterion.param_groups()
    assert group == {"params": list(criterion.parameters()), "weight_decay": 0.0}
    (group,) = criterion.param_groups(lr=0.5, weight_decay=0.25)
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    rate = torch.tensor(0.5)  # as capturable optimizers have it
    assert criterion.param_groups(lr=rate)[0]["lr"] is rate


@pytest.mark.parametrize("supervision", ["mutation", "deep_supervision", "last_layer"])
def test_a_criterion_without_parameters_has_no_group(supervision: str) -> None:
    criterion = LoMixLoss(3, 2, supervision=supervision)
    assert criterion.param_groups(lr=1.0) == []
    with silence():
        step(criterion)


def test_decay_of_the_network_does_not_reach_the_loss() -> None:
    network, criterion = nn.Conv2d(1, 3, 1), LoMixLoss(3, 2)
    groups = [{"params": network.parameters()}, *criterion.param_groups()]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(criterion.state_dict())
    for parameter in (*network.parameters(), *criterion.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    weight = network.weight.detach().clone()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    torch.testing.assert_close(network.weight.detach(), weight * 0.95)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", float("nan")), ("weight_decay", float("inf"))])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected a finite number of at least 0"):
        LoMixLoss(3, 2).param_groups(**{name: value})


# The warnings -----------------------------------------------------------------------------------------------------


def train_beside(criterion: nn.Module, *optimizers: Any, times: int = 4) -> None:
    """Steps of optimizers, each after a forward and backward pass."""
    for _ in range(times):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(criterion)
        for optimizer in optimizers:
            optimizer.step()


def of_a_network() -> torch.optim.Optimizer:
    """An optimizer of something else, with gradients of its own."""
    network = nn.Conv2d(1, 1, 1)
    network(torch.ones(1, 1, 2, 2)).sum().backward()
    return sgd(network.parameters())


def test_a_loss_in_no_optimizer_warns_at_the_second_step_and_never_again() -> None:
    criterion, optimizer = LoMixLoss(3, 2), of_a_network()
    with silence():
        train_beside(criterion, optimizer, times=1)
        step(criterion)
    with pytest.warns(
        UntrainedLossWarning, match=r"alpha, cat_weight, cat_bias, awf_weight, awf_bias do not train.*step of SGD"
    ) as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]  # of the line above, not one of torch's
    with silence():
        train_beside(criterion, optimizer)


@pytest.mark.parametrize("shows", [False, True])
def test_a_loss_in_an_optimizer_is_silent(shows: bool) -> None:
    criterion = LoMixLoss(3, 2)
    optimizer = sgd(criterion.param_groups())
    if shows:
        criterion.watch(optimizer)
    with silence():
        train_beside(criterion, of_a_network(), optimizer)
    assert criterion.untrained_parameters() == []


def test_an_optimizer_that_steps_rarely_counts() -> None:
    criterion = LoMixLoss(3, 2)
    rare = sgd(criterion.param_groups())
    with silence():
        train_beside(criterion, of_a_network())
    assert not any(p is None for p in rare.param_groups[0]["params"])


def test_parameters_that_change_by_other_hands_train() -> None:
    """As those do of which a trainer keeps a copy in float32, flattened or sharded."""
    criterion, optimizer = LoMixLoss(3, 2), of_a_network()
    with silence():
        for _ in range(4):
            train_beside(criterion, optimizer, times=1)
            for parameter in criterion.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.1)


def test_an_optimizer_that_is_gone_does_not_count() -> None:
    criterion = LoMixLoss(3, 2)
    criterion.watch(sgd(criterion.param_groups()))
    with pytest.warns(UntrainedLossWarning, match="alpha"):
        train_beside(criterion, of_a_network())


def test_what_is_missing_is_named() -> None:
    criterion = LoMixLoss(3, 2)
    optimizers = [sgd([criterion.alpha, criterion.cat_weight]), sgd([criterion.awf_weight])]
    for optimizer in optimizers:
        criterion.watch(optimizer)
    assert criterion.untrained_parameters() == ["cat_bias", "awf_bias"]
    with pytest.warns(UntrainedLossWarning, match="parameters cat_bias, awf_bias do not"):
        train_beside(criterion, *optimizers)


def test_groups_that_come_later_count() -> None:
    """As a scheduler or a trainer that adds them later does."""
    criterion = LoMixLoss(3, 2)
    optimizer = of_a_network()
    with silence():
        train_beside(criterion, optimizer, times=1)
        for group in criterion.param_groups():
            optimizer.add_param_group(group)
        train_beside(criterion, optimizer)


def test_frozen_parameters_are_not_missed() -> None:
    criterion = LoMixLoss(3, 2).requires_grad_(False)
    criterion.alpha.requires_grad_(True)
    with silence():
        train_beside(criterion, sgd([criterion.alpha]))


def test_a_loss_that_is_not_used_is_not_missed() -> None:
    criterion, optimizer = LoMixLoss(3, 2), of_a_network()
    logits = [torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(1, 3, 8, 8)]
    with silence():
        for _ in range(3):
            torch.autograd.grad(criterion(logits, torch.randint(3, (1, 8, 8))), logits[0])
            optimizer.step()


def test_compiled_code_warns_too() -> None:
    torch._dynamo.reset()
    criterion = LoMixLoss(3, 2)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with pytest.warns(UntrainedLossWarning, match="alpha"):
        train_beside(compiled, of_a_network())
    with silence():
        train_beside(compiled, of_a_network())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_has_been_shown_nothing_and_copying_is_silent(twin: Any) -> None:
    criterion = LoMixLoss(3, 2)
    optimizer = sgd(criterion.param_groups())
    criterion.watch(optimizer)
    with silence():
        other = twin(criterion)
    assert other.untrained_parameters() == [name for name, _ in other.named_parameters()]
    assert criterion.untrained_parameters() == []


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("is_decided", [False, True])
def test_a_copy_warns_for_itself(is_decided: bool, twin: Any) -> None:
    criterion = LoMixLoss(3, 2)
    optimizer = sgd(criterion.param_groups())
    if is_decided:
        train_beside(criterion, optimizer)
    criterion.cat_bias.requires_grad_(False)
    other = twin(criterion)
    with pytest.warns(UntrainedLossWarning, match="alpha, cat_weight, awf_weight, awf_bias do"):
        train_beside(other, optimizer)
    with silence():
        train_beside(other, optimizer)
        train_beside(criterion, optimizer)


def test_parameters_that_load_state_dict_has_replaced_warn() -> None:
    criterion = LoMixLoss(3, 2)
    optimizer = sgd(criterion.param_groups())
    with silence():
        train_beside(criterion, optimizer)
    criterion.load_state_dict(LoMixLoss(3, 2).state_dict(), assign=True)
    with pytest.warns(UntrainedLossWarning, match="alpha"):  # the optimizer has the old ones
        train_beside(criterion, optimizer)


def test_a_group_with_decay_warns_at_the_first_step_and_never_again() -> None:
    criterion = LoMixLoss(3, 2)
    optimizer = torch.optim.AdamW(with_loss(nn.Conv2d(1, 3, 1), criterion).parameters())  # decay of 0.01
    step(criterion)
    with pytest.warns(DecayedLossWarning, match=r"parameters alpha, .* are in a group of AdamW with weight") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    with silence():
        train_beside(criterion, optimizer)


def test_decay_that_was_shown_warns_at_once_and_decay_that_was_asked_for_does_not() -> None:
    criterion = LoMixLoss(3, 2)
    with pytest.warns(DecayedLossWarning, match="alpha"):
        criterion.watch(torch.optim.AdamW(criterion.parameters()))
    criterion = LoMixLoss(3, 2)
    with silence():
        train_beside(criterion, torch.optim.AdamW(criterion.param_groups(weight_decay=0.01)))


def test_a_loss_without_numbers_is_passed_over() -> None:
    with FakeTensorMode():
        criterion = LoMixLoss(3, 2)
        step(criterion)
    with silence():
        optimizer = of_a_network()
        for _ in range(3):
            optimizer.step()
    assert all(p.grad is not None for p in criterion.parameters())


def test_any_object_with_groups_will_do_and_nothing_else() -> None:
    criterion = LoMixLoss(3, 2)
    criterion.watch(SimpleNamespace(param_groups=[{"params": list(criterion.parameters())}]))
    assert criterion.untrained_parameters() == []
    with pytest.raises(TypeError, match=r"optimizer: got list, expected a torch\.optim\.Optimizer"):
        criterion.watch(list(criterion.parameters()))


# Recipes of docs/training.md --------------------------------------------------------------------------------------


class Network(nn.Module):
    """A head at two scales; [B, 1, 8, 8] to logits, coarsest first."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(1, 3, 2, stride=2), nn.Conv2d(1, 3, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.coarse(images), self.fine(images)]


def train(clip: Any, average: bool = False) -> tuple[nn.Module, nn.Module | None, list[dict[str, Tensor]]]:
    """Four steps, clipping by `clip(network, criterion)`; the network, its average, the weights after each step."""
    torch.manual_seed(5)
    network, criterion = Network(), LoMixLoss(3, 2)
    optimizer = sgd([{"params": network.parameters()}, *criterion.param_groups()])
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if average else None
    history = []
    for _ in range(4):
        optimizer.zero_grad()
        images = torch.randn(2, 1, 8, 8)
        criterion(network(images), (images[:, 0] > 0).long()).backward()
        clip(network, criterion)
        optimizer.step()
        history.append({name: value.detach().clone() for name, value in network.state_dict().items()})
        if averaged is not None:
            averaged.update_parameters(network)
    return network, averaged, history


def test_average_of_the_network() -> None:
    _, averaged, history = train(lambda network, criterion: None, average=True)
    assert averaged is not None
    for name, value in averaged.module.state_dict().items():
        first, second, third, fourth = (state[name] for state in history)
        torch.testing.assert_close(value, first / 8 + second / 8 + third / 4 + fourth / 2)


def test_average_of_network_and_loss_together() -> None:
    module = with_loss(Network(), LoMixLoss(3, 2))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(module)
    images = torch.randn(2, 1, 8, 8)
    target = torch.randint(3, (2, 8, 8))
    assert torch.equal(averaged(images, target), module(images, target))
    fresh = AveragedModel(with_loss(Network(), LoMixLoss(3, 2)))
    fresh.load_state_dict(averaged.state_dict())
    assert torch.equal(fresh(images, target), module(images, target))


def test_clipping_apart_leaves_the_network_its_own_norm() -> None:
    """The weights' gradients are losses of whole maps: clipped together, they take the network's share."""
    norms: list[tuple[float, float]] = []

    def apart(network: nn.Module, criterion: nn.Module) -> None:
        own = nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()
        joint = nn.utils.get_total_norm([p.grad for m in (network, criterion) for p in m.parameters()]).item()
        norms.append((own, joint))
        for module in (network, criterion):
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            clipped = nn.utils.get_total_norm([p.grad for p in module.parameters()])
            assert clipped.item() <= 1.0 + 1e-6

    train(apart)
    assert norms[0][1] > 1.2 * norms[0][0]
