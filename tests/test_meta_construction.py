"""A loss made on the meta device, moved, copied or replicated is the loss that its state dict came from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomix_fast import LoMixLoss, with_loss
from lomix_fast.constants import Constant
from lomix_fast.official import CombinatorialMutationsLossModule

TARGET = torch.arange(2 * 64).reshape(2, 8, 8) % 4


class DiceLoss(nn.Module):
    """What the authors' Dice says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.n_classes = 4


def draw() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, n, generator=generator) for n in (2, 4, 8)]


def make(kind: str) -> nn.Module:
    if kind == "official":
        return CombinatorialMutationsLossModule(3, 4, 3, ["add", "wf"], supervision="lomix")
    weights = {"weight": [1, 2, 3, 4], "ce_weight": [4, 3, 2, 1]} if "weighted" in kind else {}
    criterion = LoMixLoss(4, 3, **weights)
    return with_loss(nn.Identity(), criterion) if "joined" in kind else criterion


def loss(module: nn.Module) -> Tensor:
    if isinstance(module, CombinatorialMutationsLossModule):
        return module(draw(), TARGET, nn.CrossEntropyLoss(), DiceLoss())[0].sum()
    return module(draw(), TARGET)


def source(kind: str) -> nn.Module:
    """A module whose every parameter has a value of its own."""
    torch.manual_seed(1)
    module = make(kind)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter))
    return module


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return make(kind)


def assigned(module: nn.Module, kind: str) -> nn.Module:
    new = on_meta(kind)
    new.load_state_dict(module.state_dict(), assign=True)
    return new


def emptied(module: nn.Module, kind: str) -> nn.Module:
    new = on_meta(kind).to_empty(device="cpu")
    new.load_state_dict(module.state_dict())
    return new


def assigned_after(new: nn.Module, module: nn.Module) -> nn.Module:
    new.load_state_dict(module.state_dict(), assign=True)
    return new


WAYS: dict[str, Any] = {
    "assign": assigned,
    "to_empty": emptied,
    "to meta": lambda module, kind: assigned_after(make(kind).to("meta"), module),
    "deepcopy of meta": lambda module, kind: assigned_after(copy.deepcopy(on_meta(kind)), module),
    "pickle of meta": lambda module, kind: assigned_after(pickle.loads(pickle.dumps(on_meta(kind))), module),
    "deepcopy": lambda module, kind: copy.deepcopy(module),
    "pickle": lambda module, kind: pickle.loads(pickle.dumps(module)),
}
KINDS = ["plain", "weighted", "joined", "joined weighted", "official"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_same_loss_and_gradients(way: str, kind: str) -> None:
    module = source(kind)
    new = WAYS[way](module, kind)
    wanted = torch.autograd.grad(loss(module), used(module), materialize_grads=True)
    for _ in range(2):
        assert torch.equal(loss(new), loss(module))
    found = torch.autograd.grad(loss(new), used(new), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def used(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_follows_from_the_configuration_is_a_buffer(kind: str) -> None:
    assert not list(make(kind).buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_values_are_refused_by_name(kind: str) -> None:
    name = "CombinatorialMutationsLossModule" if kind == "official" else "LoMixLoss"
    with pytest.raises(ValueError, match=rf"{name}: got parameters on the meta device.*load_state_dict\(state_dict, a"):
        loss(on_meta(kind))


def test_class_weights_without_values_are_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"ce_weight: got a tensor without values.*pass a l"):
        LoMixLoss(3, 2, ce_weight=torch.tensor([1.0, 2.0, 3.0]))
    with torch.device("meta"):
        assert LoMixLoss(3, 2, weight=0.5).weight.item() == 0.5


def as_replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them: of shared attributes, with parameters that are no leaves."""
    replica = module._replicate_for_data_parallel()
    for key, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[key] = None
        else:
            setattr(replica, key, parameter.view_as(parameter))
    for key, child in module._modules.items():
        replica._modules[key] = as_replica(child)
    return replica


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_replicas(kind: str) -> None:
    module = source(kind)
    wanted = torch.autograd.grad(loss(module), used(module))
    found = torch.autograd.grad(loss(as_replica(module)), used(module))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_evaluation_in_inference_mode_leaves_training_as_it_was() -> None:
    criterion = source("weighted")
    for value in vars(criterion).values():
        if isinstance(value, Constant):
            value._held.clear()
    with torch.inference_mode():
        evaluated = loss(criterion).clone()
    trained = loss(criterion)
    trained.backward()
    assert trained.item() == evaluated.item() and criterion.awf_weight.grad is not None
