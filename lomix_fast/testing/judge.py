"""How a backend is run on a case and judged against float64: the same for the tests and for `lomix_fast doctor`.

The truth is the reference in float64 on the CPU, the yardstick is plain PyTorch in the dtype of the case on the device
of the backend, and everything is compared on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..ops import map_stats
from ..reference import compute_dtype, map_stats_reference
from .cases import Case, Inputs, make_inputs
from .placement import move_inputs
from .precision import full_float32

# What a backend may add to the error of plain PyTorch, relative to the largest number of its group: room for another
# order of summation and another exp, and for gradients in a narrow dtype half a unit in its last place.
STATS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

_CPU = torch.device("cpu")


class WrongResultError(AssertionError):
    """A backend computed something else than the definition; the message says what, where and by how much.

    It is raised, never asserted, and so does not vanish under `python -O`.
    """


@dataclass(frozen=True)
class Outcome:
    """Statistics [B, M, 1 + 2C], label counts [B, 1 + C], and the gradients of all inputs by name."""

    stats: Tensor
    target_stats: Tensor
    gradients: dict[str, Tensor]

    def cpu(self) -> Outcome:
        """The same on the CPU, where outcomes are compared; copies only what is elsewhere."""
        return Outcome(self.stats.cpu(), self.target_stats.cpu(), {name: g.cpu() for name, g in self.gradients.items()})


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: for people, such as "stats group ce" or "gradient of cat_weight".
        ratio: the largest error over the error allowed; infinite when there is no number to compare.
        complaint: what is wrong, or None.
    """

    what: str
    ratio: float
    complaint: str | None


def cotangent(case: Case, seed: int = 1) -> Tensor:
    """A random dLoss/dstats [B, M, 1 + 2C], float64 on the CPU; the same for every backend, dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.plan.num_maps, 1 + 2 * case.classes)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run_backend(case: Case, impl: str, inputs: Inputs | None = None) -> Outcome:
    """Forward and backward of one backend through the public `map_stats`.

    Args:
        case: what to compute.
        impl: name of the backend.
        inputs: of the case, on any device; gradients are asked of them in place. None draws them on the CPU.

    Returns:
        The outcome, on the device of the inputs.

    Raises:
        RuntimeError: the backend cannot run there; and whatever the backend itself raises.
    """
    inputs = (make_inputs(case) if inputs is None else inputs).requires_grad_()
    stats, target_stats = map_stats(inputs.logits, inputs.target, case.plan, **inputs.arguments(case), impl=impl)
    return Outcome(stats.detach(), target_stats, _gradients(stats, inputs, cotangent(case)))


def _run_plain(case: Case, inputs: Inputs) -> Outcome:
    target = inputs.target_for(case)
    with full_float32():
        stats, target_stats = map_stats_reference(inputs.logits, target, case.plan, **inputs.parameters)
        return Outcome(stats.detach(), target_stats, _gradients(stats, inputs, cotangent(case))).cpu()


def _gradients(stats: Tensor, inputs: Inputs, grad_stats: Tensor) -> dict[str, Tensor]:
    named = inputs.differentiable
    weight = grad_stats.to(stats.dtype).to(stats.device)
    found = torch.autograd.grad(stats, list(named.values()), weight, allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@cache
def truth_of(case: Case) -> Outcome:
    """The reference in float64 under autograd, from the very numbers that the case holds in its own dtype; on CPU."""
    return _run_plain(case, make_inputs(case).to(torch.float64).requires_grad_())


@cache
def plain_of(case: Case, device: torch.device = _CPU) -> Outcome:
    """Plain PyTorch at the dtype of the case: the error that nobody may exceed by much.

    Args:
        case: what to compute.
        device: where it is computed, without TF32.

    Returns:
        The outcome, copied to the CPU.
    """
    inputs = make_inputs(case)
    if device != _CPU:
        inputs = move_inputs(inputs, device)
    return _run_plain(case, inputs.requires_grad_())


def conditioning(case: Case) -> float:
    """How much rounding is magnified: by the magnitude of the logits, and by sums over many classes in cat and awf."""
    return max(1.0, case.magnitude) * max(1.0, case.classes**0.5 / 4)


def judge_stats(case: Case, got: Outcome, device: torch.device = _CPU) -> list[Finding]:
    """Hold statistics against float64, map by map and group by group.

    Args:
        case: what was computed.
        got: the outcome of a backend, on the CPU.
        device: where the backend ran; plain PyTorch is run there as well.

    Returns:
        A finding for the label counts and one for each group of columns; or one that says that the form is wrong.
    """
    truth, plain = truth_of(case), plain_of(case, device)
    if (complaint := _form_of_stats(case, got, truth)) is not None:
        return [Finding("stats", math.inf, complaint)]
    findings = [Finding("label counts", 0.0, None)]
    if not inputs_are_counted(case):
        # Sums of real numbers rather than counts.
        scale = truth.target_stats.abs().amax(1, keepdim=True).clamp(min=1.0)
        allowed = (plain.target_stats - truth.target_stats).abs() + STATS_TOLERANCE[got.stats.dtype] * scale
        findings = [_compare("label sums", got.target_stats, truth.target_stats, allowed)]
    elif not torch.equal(got.target_stats.double(), truth.target_stats):
        bad = got.target_stats.double() != truth.target_stats
        where = tuple(bad.nonzero()[0].tolist())
        complaint = (
            f"label counts: {int(bad.sum())} of {bad.numel()} wrong, first at {where}: got "
            f"{got.target_stats[where].item()!r}, expected {truth.target_stats[where].item()!r} exactly"
        )
        findings = [Finding("label counts", math.inf, complaint)]
    tolerance = STATS_TOLERANCE[got.stats.dtype] * conditioning(case)
    groups = (("ce", slice(0, 1)), ("I", slice(1, 1 + case.classes)), ("Q", slice(1 + case.classes, None)))
    for group, columns in groups:
        expected = truth.stats[:, :, columns]  # [B, M, 1 or C]
        scale = expected.abs().amax(2, keepdim=True).clamp(min=1e-3 * case.pixels)
        allowed = (plain.stats[:, :, columns] - expected).abs().amax(2, keepdim=True) + tolerance * scale
        findings.append(_compare(f"stats group {group}", got.stats[:, :, columns], expected, allowed))
    return findings


def inputs_are_counted(case: Case) -> bool:
    """Whether the target statistics of a case are whole numbers, which are exact."""
    has_shares = case.dense and case.target_dtype.is_floating_point
    return not has_shares and not case.ce_weight and case.weight_map in (None, torch.bool)


def _form_of_stats(case: Case, got: Outcome, truth: Outcome) -> str | None:
    dtype = compute_dtype(case.dtype)
    for what, found, expected in (
        ("stats", got.stats, truth.stats),
        ("label counts", got.target_stats, truth.target_stats),
    ):
        if found.shape != expected.shape or found.dtype != dtype:
            return (
                f"{what}: got {found.dtype} of shape {tuple(found.shape)}, expected {dtype} of shape "
                f"{tuple(expected.shape)}"
            )
    return None


def judge_gradients(case: Case, got: Outcome, device: torch.device = _CPU) -> list[Finding]:
    """Hold gradients against float64, tensor by tensor.

    Args:
        case, got, device: as for `judge_stats`.

    Returns:
        A finding for each gradient; or one that says that some are missing or too many.
    """
    truth, plain = truth_of(case), plain_of(case, device)
    if got.gradients.keys() != truth.gradients.keys():
        complaint = f"gradients: got those of {sorted(got.gradients)}, expected those of {sorted(truth.gradients)}"
        return [Finding("gradients", math.inf, complaint)]
    findings = []
    for name, expected in truth.gradients.items():
        found, what = got.gradients[name], f"gradient of {name}"
        if found.shape != expected.shape or found.dtype not in GRADIENT_TOLERANCE:
            complaint = f"{what}: got {found.dtype} of shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            findings.append(Finding(what, math.inf, complaint))
            continue
        if not expected.numel():
            findings.append(Finding(what, 0.0, None))
            continue
        tolerance = GRADIENT_TOLERANCE[found.dtype] * conditioning(case)
        scale = expected.abs().max().clamp(min=0.5 * _terms(case, name, expected) ** 0.5)
        allowed = (plain.gradients[name].double() - expected).abs().max() + tolerance * scale
        findings.append(_compare(what, found, expected, allowed.expand_as(expected)))
    return findings


def judge(case: Case, got: Outcome, device: torch.device = _CPU) -> list[Finding]:
    """All findings on an outcome: those of `judge_stats`, then those of `judge_gradients`, with their arguments."""
    return judge_stats(case, got, device) + judge_gradients(case, got, device)


def check_stats(case: Case, got: Outcome, device: torch.device = _CPU) -> None:
    """Check that statistics are as near to float64 as those of plain PyTorch, map by map and group by group.

    Raises:
        WrongResultError: they are not.
    """
    _raise_first(judge_stats(case, got, device))


def check_gradients(case: Case, got: Outcome, device: torch.device = _CPU) -> None:
    """Check that gradients are as near to float64 as those of plain PyTorch, tensor by tensor.

    Raises:
        WrongResultError: they are not.
    """
    _raise_first(judge_gradients(case, got, device))


def _raise_first(findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.complaint is not None:
            raise WrongResultError(finding.complaint)


def _terms(case: Case, name: str, gradient: Tensor) -> float:
    """How many random terms, each about 1, an entry of a gradient adds up: they may cancel, their rounding not."""
    if name.startswith("logits"):
        return case.plan.num_maps * max(1.0, case.pixels / gradient.shape[2:].numel())
    return case.batch * case.pixels


def _compare(what: str, got: Tensor, expected: Tensor, allowed: Tensor) -> Finding:
    """Compare in float64; `allowed` has the shape of `expected` or one that expands to it."""
    if not expected.numel():
        return Finding(what, 0.0, None)
    error = (got.double() - expected).abs()
    # 0 / 0 is an exact result where nothing is allowed, as in an empty batch; NaN stays NaN.
    worst = float((error / allowed).where(error != 0, 0.0).max())
    bad = ~(error <= allowed)  # written so that NaN is bad
    ratio = worst if math.isfinite(worst) else math.inf
    return Finding(what, ratio, _report(what, bad, got, expected, allowed) if bad.any() else None)


def _report(what: str, bad: Tensor, got: Tensor, expected: Tensor, allowed: Tensor) -> str:
    where = tuple(bad.nonzero()[0].tolist())
    limit = allowed.expand_as(expected)[where].item()
    return (
        f"{what}: {int(bad.sum())} of {bad.numel()} wrong, first at {where}: got {got[where].item()!r}, "
        f"expected {expected[where].item()!r} +- {limit:.2e}"
    )
