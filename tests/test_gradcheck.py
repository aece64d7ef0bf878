"""Numerical derivatives in float64: every operator, mode and interpolation ratio, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import NATIVE
from torch import Tensor
from torch.autograd import gradcheck

from lomix_fast import LoMixLoss, MixPlan, lomix_loss, map_stats
from lomix_fast.testing.cases import Case, make_inputs

ALL = ("add", "mul", "cat", "awf")
backends = pytest.mark.parametrize("impl", NATIVE)

RATIOS = {
    "all full size": ((3, 4), ((3, 4), (3, 4))),
    "powers of two": ((4, 4), ((1, 1), (2, 2))),
    "anisotropic": ((2, 6), ((2, 2), (1, 6))),
    "not whole numbers": ((5, 3), ((2, 2), (3, 2))),
    "native larger": ((3, 2), ((2, 2), (5, 3))),
    "to one pixel": ((1, 1), ((2, 3), (1, 1))),
    "line": ((5,), ((2,), (3,))),
    "volume": ((2, 3, 2), ((1, 2, 1), (2, 3, 2))),
    "volume, native larger": ((2, 1, 3), ((1, 2, 2), (3, 2, 4))),
}


def check_map_stats(one: Case, impl: str, fast: bool = False) -> None:
    """gradcheck of every output of map_stats with respect to every logit and parameter.

    Fast mode checks one random combination of them; the reference, which is autograd's own work, needs no more.
    """
    inputs = make_inputs(one).requires_grad_()
    named = inputs.differentiable
    scales = len(inputs.logits)

    def stats_of(*tensors: Tensor) -> Tensor:
        parameters = dict(zip(list(named)[scales:], tensors[scales:], strict=True))
        arguments = inputs.arguments(one) | parameters
        return map_stats(tensors[:scales], inputs.target, one.plan, **arguments, impl=impl)[0]

    assert gradcheck(stats_of, tuple(named.values()), fast_mode=fast or impl == "reference", atol=1e-6, rtol=1e-5)


@backends
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("operator", ALL)
def test_operator(operator: str, squared: bool, impl: str) -> None:
    one = Case("", 2, 3, (2, 3), ((1, 2), (2, 3), (2, 2)), torch.float64, (operator,), (), squared)
    check_map_stats(one, impl)


@backends
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio(ratio: str, impl: str) -> None:
    full, native = RATIOS[ratio]
    check_map_stats(Case("", 1, 2, full, native, torch.float64), impl)


@backends
@pytest.mark.parametrize(
    "one",
    [
        Case("five scales", 1, 2, (3, 3), ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3)), torch.float64),
        Case("one scale", 2, 3, (3, 3), ((2, 2),), torch.float64),
        Case("many classes", 1, 19, (2, 3), ((1, 2), (2, 3)), torch.float64),
        Case("finest only", 1, 3, (3, 3), ((1, 1), (2, 2)), torch.float64, (), (1,)),
        Case("large logits", 1, 3, (2, 3), ((1, 2), (2, 3)), torch.float64, ("add", "awf"), magnitude=5.0),
        Case("other strides", 2, 3, (4, 4), ((2, 2), (3, 3), (4, 4)), torch.float64, layout="transposed"),
    ],
    ids=lambda c: c.name,
)
def test_other_shapes(one: Case, impl: str) -> None:
    check_map_stats(one, impl, fast=True)


_SMALL = Case("", 1, 3, (2, 3), ((1, 2), (2, 3)), torch.float64)


@backends
@pytest.mark.parametrize(
    "one",
    [
        replace(_SMALL, name="sigmoid", sigmoid=True, dense=True, target_dtype=torch.bool),
        replace(_SMALL, name="sigmoid soft", sigmoid=True, dense=True, target_dtype=torch.float32, ce_weight=True,
                weight_map=torch.float64, squared=False),
        replace(_SMALL, name="soft labels", dense=True, target_dtype=torch.float64, label_smoothing=0.1),
        replace(_SMALL, name="weights", weight_map=torch.float32, ce_weight=True, ignore_index=1),
        replace(_SMALL, name="weights of dice", weight_map=torch.float32, weighted_ce=False, squared=False),
        replace(_SMALL, name="smoothing", label_smoothing=0.3, ce_weight=True),
        replace(_SMALL, name="bounded", operators=("mul",), bounded=True, magnitude=3.0),
        replace(_SMALL, name="extra", operators=("sub", "avg", "max")),
        replace(_SMALL, name="extra, three members", operators=("sub", "avg", "max"),
                native=((1, 2), (2, 3), (2, 2))),
    ],
    ids=lambda c: c.name,
)  # fmt: skip
def test_recipes(one: Case, impl: str) -> None:
    check_map_stats(one, impl)


def modes() -> dict[str, dict[str, object]]:
    return {
        "lomix": {},
        "mutation": {"supervision": "mutation"},
        "deep_supervision": {"supervision": "deep_supervision"},
        "last_layer": {"supervision": "last_layer"},
        "learned deep supervision": {"operators": ()},
        "fixed": {"weighting": "fixed"},
        "subset": {"awf_sharing": "subset"},
        "scale": {"awf_sharing": "scale", "order": "fine_to_coarse"},
        "per sample": {"batch": False, "include_background": False, "squared_pred": False},
    }


@backends
@pytest.mark.parametrize("mode", modes())
def test_lomix_loss(mode: str, impl: str) -> None:
    """Through the module: logits, alpha and every parameter of the mixes."""
    options = modes()[mode]
    criterion = LoMixLoss(3, 3, impl=impl, **options).double()
    sizes = [(1, 2), (2, 2), (3, 4)]
    if criterion.order == "fine_to_coarse":
        sizes.reverse()
    logits = [torch.randn(2, 3, *n, dtype=torch.float64, requires_grad=True) for n in sizes]
    used = logits if mode != "last_layer" else logits[-1:]
    target = torch.randint(3, (2, 3, 4))
    for parameter in criterion.parameters():
        torch.nn.init.normal_(parameter)
    names, parameters = zip(*criterion.named_parameters(), strict=True) if list(criterion.parameters()) else ((), ())

    def loss_of(*tensors: Tensor) -> Tensor:
        values = dict(zip(names, tensors[len(used) :], strict=True))
        scales = [*logits[: len(logits) - len(used)], *tensors[: len(used)]]
        return torch.func.functional_call(criterion, values, (scales, target))

    assert gradcheck(loss_of, (*used, *parameters), fast_mode=True, atol=1e-7, rtol=1e-5)


@backends
def test_functional_loss_with_respect_to_weights(impl: str) -> None:
    plan = MixPlan.create(2, ("add", "mul"))
    logits = [torch.randn(1, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    weights = torch.rand(plan.num_maps, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (1, 3, 3))
    assert gradcheck(lambda w, *z: lomix_loss(z, target, w, plan, impl=impl), (weights, *logits))
