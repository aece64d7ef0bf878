"""How tests run a backend on a case and judge it against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lomix_fast import MixPlan, available_backends, map_stats
from lomix_fast.reference import map_stats_reference
from lomix_fast.testing.cases import Case, Inputs, make_inputs

# Every backend that runs here. test_backends.py fails when the compiled one is missing by accident.
BACKENDS = [name for name, reason in available_backends().items() if reason is None]
# Those with kernels of our own, which promise the same bits every time; PyTorch's matrix products make no such promise.
COMPILED = [name for name in BACKENDS if name not in ("reference", "eager")]

# What a backend may add to the error of plain PyTorch, relative to the largest number of its group: room for another
# order of summation and another exp, and for gradients in a narrow dtype half a unit in its last place.
STATS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass
class Outcome:
    """Statistics [B, M, 1 + 2C], label counts [B, 1 + C], and the gradients of all inputs by name."""

    stats: Tensor
    target_stats: Tensor
    gradients: dict[str, Tensor]


def cotangent(case: Case, seed: int = 1) -> Tensor:
    """A random dLoss/dstats [B, M, 1 + 2C], float64; the same for every backend and dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.plan.num_maps, 1 + 2 * case.classes)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run_backend(case: Case, impl: str, inputs: Inputs | None = None) -> Outcome:
    """Forward and backward of one backend through the public `map_stats`."""
    inputs = (make_inputs(case) if inputs is None else inputs).requires_grad_()
    stats, target_stats = map_stats(inputs.logits, inputs.target, case.plan, **inputs.parameters, impl=impl)
    return Outcome(stats.detach(), target_stats, _gradients(stats, inputs, cotangent(case)))


def _run_plain(case: Case, inputs: Inputs) -> Outcome:
    target = inputs.target.squeeze(1) if case.target_layout == "channel" else inputs.target
    stats, target_stats = map_stats_reference(inputs.logits, target, case.plan, **inputs.parameters)
    return Outcome(stats.detach(), target_stats, _gradients(stats, inputs, cotangent(case)))


def _gradients(stats: Tensor, inputs: Inputs, grad_stats: Tensor) -> dict[str, Tensor]:
    named = inputs.differentiable
    found = torch.autograd.grad(stats, list(named.values()), grad_stats.to(stats.dtype), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@cache
def truth_of(case: Case) -> Outcome:
    """The reference in float64 under autograd, from the very numbers that the case holds in its own dtype."""
    return _run_plain(case, make_inputs(case).to(torch.float64).requires_grad_())


@cache
def plain_of(case: Case) -> Outcome:
    """Plain PyTorch at the dtype of the case: the error that nobody may exceed by much."""
    return _run_plain(case, make_inputs(case).requires_grad_())


def conditioning(case: Case) -> float:
    """How much rounding is magnified: by the magnitude of the logits, and by sums over many classes in cat and awf."""
    return max(1.0, case.magnitude) * max(1.0, case.classes**0.5 / 4)


def check_stats(case: Case, got: Outcome) -> None:
    """Assert that statistics are as near to float64 as those of plain PyTorch, map by map and group by group."""
    truth, plain = truth_of(case), plain_of(case)
    assert torch.equal(got.target_stats.double(), truth.target_stats)
    assert got.stats.shape == truth.stats.shape
    tolerance = STATS_TOLERANCE[got.stats.dtype] * conditioning(case)
    groups = (("ce", slice(0, 1)), ("I", slice(1, 1 + case.classes)), ("Q", slice(1 + case.classes, None)))
    for group, columns in groups:
        expected = truth.stats[:, :, columns]  # [B, M, 1 or C]
        scale = expected.abs().amax(2, keepdim=True).clamp(min=1e-3 * case.pixels)
        error = (got.stats[:, :, columns] - expected).abs()
        allowed = (plain.stats[:, :, columns] - expected).abs().amax(2, keepdim=True) + tolerance * scale
        bad = ~(error <= allowed)
        assert not bad.any(), _report(f"stats group {group}", bad, got.stats[:, :, columns], expected, allowed)


def check_gradients(case: Case, got: Outcome) -> None:
    """Assert that gradients are as near to float64 as those of plain PyTorch, tensor by tensor."""
    truth, plain = truth_of(case), plain_of(case)
    assert got.gradients.keys() == truth.gradients.keys()
    for name, expected in truth.gradients.items():
        found = got.gradients[name]
        assert found.shape == expected.shape
        if not expected.numel():
            continue
        tolerance = GRADIENT_TOLERANCE[found.dtype] * conditioning(case)
        scale = expected.abs().max().clamp(min=0.5 * _terms(case, name, expected) ** 0.5)
        allowed = (plain.gradients[name].double() - expected).abs().max() + tolerance * scale
        bad = ~((found.double() - expected).abs() <= allowed)
        assert not bad.any(), _report(f"gradient of {name}", bad, found, expected, allowed.expand_as(expected))


def _terms(case: Case, name: str, gradient: Tensor) -> float:
    """How many random terms, each about 1, an entry of a gradient adds up: they may cancel, their rounding not."""
    if name.startswith("logits"):
        return case.plan.num_maps * max(1.0, case.pixels / gradient.shape[2:].numel())
    return case.batch * case.pixels


def _report(what: str, bad: Tensor, got: Tensor, expected: Tensor, allowed: Tensor) -> str:
    where = tuple(bad.nonzero()[0].tolist())
    limit = allowed.expand_as(expected)[where].item()
    return (
        f"{what}: {int(bad.sum())} of {bad.numel()} wrong, first at {where}: got {got[where].item()!r}, "
        f"expected {expected[where].item()!r} +- {limit:.2e}"
    )


def largest_relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, 0 for two empty tensors."""
    if not b.numel():
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=math.ulp(0.0))).item()


def small_plan(operators: tuple[str, ...] = ("add", "mul", "cat", "awf"), num_scales: int = 2) -> MixPlan:
    """The plan most tests use when the plan is not what they are about."""
    return MixPlan.create(num_scales, operators)
