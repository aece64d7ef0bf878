"""Correctness before speed: no contender is timed whose loss or gradients are not those of the definition."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lomix_fast.recipe import map_losses, total_loss
from lomix_fast.reference import map_stats_reference
from lomix_fast.testing.cases import Case

from .contenders import Contender
from .prepared import Prepared
from .problem import Problem, make_problem

# Largest error allowed, relative to the largest number of the tensor: (loss, gradients), by dtype of the logits.
TOLERANCE = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-5, 2e-2),
    torch.float16: (1e-5, 4e-3),
}
_CPU = torch.device("cpu")
# What contenders that are not the loss compute, relative, by name.
OWN_TOLERANCE = {"exponential": 1e-6}
# Between contenders at full size: (loss, norm of each gradient). Looser, since float32 itself loses digits over
# millions of pixels; it is there for what goes wrong only when problems are large.
AGREEMENT = (1e-4, 1e-3)


class GateError(Exception):
    """A contender computes something else; the message says who, what and by how much."""


def truth(problem: Problem) -> dict[str, Tensor]:
    """Loss and all gradients in float64, from `lomix_fast.reference` under autograd."""
    exact = problem.double().requires_grad_()
    rows = exact.row_of_pair
    awf_weight = None if exact.awf_weight is None else exact.awf_weight[rows]
    awf_bias = None if exact.awf_bias is None else exact.awf_bias[rows]
    stats, target_stats = map_stats_reference(
        exact.logits, exact.whole_target(), exact.case.plan, exact.cat_weight, exact.cat_bias, awf_weight, awf_bias
    )
    losses = map_losses(stats, target_stats, sigmoid=exact.case.sigmoid)
    total = total_loss(losses, F.softplus(exact.alpha))
    total.backward()
    return results(total, Prepared(lambda: total, exact.leaves))


def results(loss: Tensor, prepared: Prepared) -> dict[str, Tensor]:
    """Loss and gradients after a backward pass, by name."""
    gradients = {name: leaf.grad for name, leaf in prepared.leaves.items()}
    return {"loss": loss.detach()} | {name: g for name, g in gradients.items() if g is not None}


def errors(contender: Contender, small: Case, where: torch.device = _CPU) -> dict[str, float]:
    """Error of the loss and of every gradient of a contender on a small case, relative to the truth's largest value.

    A gradient that is missing or of another shape has an infinite error, one that is not a number too. What is not
    the loss has errors of its own. The contender runs on the device `where`, the truth on the CPU.
    """
    if contender.own_errors is not None:
        return contender.own_errors()
    problem = make_problem(small)
    expected = truth(problem)  # first: it takes a copy, and the problem then belongs to the contender
    prepared = contender.prepare(problem.to(where))
    loss = prepared.loss()
    loss.backward()
    got = {name: value.cpu() for name, value in results(loss, prepared).items()}
    return {name: _error(got.get(name), value) for name, value in expected.items()}


def _error(got: Tensor | None, expected: Tensor) -> float:
    if got is None or got.shape != expected.shape:
        return math.inf
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def check(name: str, small: Case, found: Mapping[str, float]) -> float:
    """Return the largest error of `errors`, or raise.

    Raises:
        GateError: the loss or a gradient is off by more than `TOLERANCE`, or another quantity by more than
            `OWN_TOLERANCE`.
    """
    loss_limit, gradient_limit = TOLERANCE[small.dtype]
    for quantity, error in found.items():
        limit = OWN_TOLERANCE.get(quantity, loss_limit if quantity == "loss" else gradient_limit)
        if not error <= limit:
            raise GateError(
                f"{name} on {small.name}: {quantity} is off by {error:.2e} of its largest value against the float64 "
                f"reference, allowed {limit:.0e}; no time is written for a wrong result"
            )
    return max(found.values())


def fingerprint(loss: Tensor, prepared: Prepared) -> dict[str, float]:
    """The loss and the norm of every gradient: enough to see contenders disagree where no truth is affordable."""
    return {name: float(value.double().norm()) for name, value in results(loss, prepared).items()}


def check_agreement(case: Case, fingerprints: Mapping[str, Mapping[str, float]]) -> None:
    """Compare the full-size results of all contenders with those of the first.

    Raises:
        GateError: two differ by more than `AGREEMENT`, or something is not finite.
    """
    names = list(fingerprints)
    first = fingerprints[names[0]]
    for name in names:
        for quantity, value in first.items():
            limit = AGREEMENT[0] if quantity == "loss" else AGREEMENT[1]
            other = fingerprints[name].get(quantity, math.nan)
            if not abs(other - value) <= limit * abs(value):
                raise GateError(
                    f"{name} on {case.name}: {quantity} at full size is {other:.9g} where {names[0]} has "
                    f"{value:.9g}, allowed a difference of {limit:.0e} of it; no time is written for a wrong result"
                )
