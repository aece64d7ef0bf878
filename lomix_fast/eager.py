"""One map at a time in plain PyTorch, recomputed in the backward pass: memory independent of the number of maps.

Runs on any device torch knows. Holds the L interpolated scales and a handful of map-sized temporaries, never M maps.
The gradients are the closed forms of DESIGN.md rather than autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .labels import poison
from .plan import MUL_BOUND, MapSpec, MixPlan
from .reference import bounded, compute_dtype, neighbours, stats_of_map, upsample
from .target import Pixels, Target, ce_factors, read_target, target_stats

_ADJOINT = {
    1: torch.ops.aten.upsample_linear1d_backward,
    2: torch.ops.aten.upsample_bilinear2d_backward,
    3: torch.ops.aten.upsample_trilinear3d_backward,
}


def forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    problem = _prepare(logits, target, parameters, plan)
    scales, pixels, dtype = problem.scales, problem.pixels, problem.scales[0].dtype
    batch, num_classes, _ = scales[0].shape
    stats = scales[0].new_empty(batch, plan.num_maps, 1 + 2 * num_classes)
    for m, spec in enumerate(plan.maps):
        stats[:, m] = stats_of_map(_mix(spec, problem), pixels, problem.factors, plan)
    counts = target_stats(pixels, target.ce_weight, num_classes, dtype, plan.squared)
    return poison(stats, pixels.invalid), counts


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    problem = _prepare(logits, target, parameters, plan)
    scales = problem.scales
    grad_stats = poison(grad_stats.to(scales[0].dtype), problem.pixels.invalid)
    grad_scales = [torch.zeros_like(p) if i in plan.used_scales else p for i, p in enumerate(scales)]
    grad_values = [None if p is None else torch.zeros_like(p) for p in problem.values]
    for m, spec in enumerate(plan.maps):
        grad_map = _grad_of_map(_mix(spec, problem), problem, grad_stats[:, m])
        _unmix(spec, grad_map, problem, grad_scales, grad_values)
    grads = [
        _adjoint(g, z, target.full) if i in plan.used_scales else torch.zeros_like(z)
        for i, (g, z) in enumerate(zip(grad_scales, logits, strict=True))
    ]
    return grads, grad_values


@dataclass(frozen=True)
class _Problem:
    """One call with its pixels in one axis: scales [B, C, N], pixels [B, N], W, b, u, v in the compute dtype."""

    plan: MixPlan
    scales: list[Tensor]
    pixels: Pixels
    factors: tuple[Tensor, Tensor]
    values: list[Tensor | None]


def _prepare(logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan) -> _Problem:
    dtype, num_classes = compute_dtype(logits[0].dtype), logits[0].shape[1]
    pixels = read_target(target, num_classes, dtype)
    flat = Pixels(
        None if pixels.index is None else pixels.index.flatten(1),
        None if pixels.dense is None else pixels.dense.flatten(2),
        None if pixels.dice_weight is None else pixels.dice_weight.flatten(1),
        None if pixels.ce_weight is None else pixels.ce_weight.flatten(1),
        pixels.invalid,
    )
    # Scales that no map reads take no memory.
    nothing = torch.zeros((), dtype=dtype, device=logits[0].device)
    nothing = nothing.expand(*logits[0].shape[:2], target.full.numel())
    scales = [
        upsample(z.to(dtype), target.full).flatten(2) if i in plan.used_scales else nothing
        for i, z in enumerate(logits)
    ]
    values = [None if p is None else p.to(dtype) for p in parameters]
    return _Problem(plan, scales, flat, ce_factors(target, num_classes, dtype), values)


def _attention(spec: MapSpec, scales: Sequence[Tensor], values: Sequence[Tensor | None]) -> Tensor:
    """Softmax over members of u . P + v: [|S|, B, N]."""
    weight, bias = values[2], values[3]
    assert weight is not None and bias is not None
    scores = [
        torch.einsum("c,bcn->bn", weight[spec.first_pair + j], scales[i]) + bias[spec.first_pair + j]
        for j, i in enumerate(spec.members)
    ]
    return torch.stack(scores).softmax(0)


def _mix(spec: MapSpec, problem: _Problem) -> Tensor:
    """One map [B, C, N] from the scales [B, C, N]."""
    scales, values = problem.scales, problem.values
    first, *others = spec.members
    if spec.operator == "orig":
        return scales[first]
    if spec.operator == "mul":
        factors = [bounded(scales[i]) if problem.plan.bounded else scales[i] for i in spec.members]
        combined = factors[0].clone()
        for factor in factors[1:]:
            combined.mul_(factor)
        return combined
    if spec.operator in ("add", "avg", "sub", "max"):
        combined = scales[first].clone()
        for i in others:
            if spec.operator == "max":
                torch.maximum(combined, scales[i], out=combined)
            else:
                combined.sub_(scales[i]) if spec.operator == "sub" else combined.add_(scales[i])
        return combined.div_(len(spec.members)) if spec.operator == "avg" else combined
    combined = torch.zeros_like(scales[first])
    if spec.operator == "cat":
        weight, bias = values[0], values[1]
        assert weight is not None and bias is not None
        combined += bias[spec.subset].view(1, -1, 1)
        for j, i in enumerate(spec.members):
            combined += weight[spec.first_pair + j] @ scales[i]
        return combined
    for a, i in zip(_attention(spec, scales, values), spec.members, strict=True):
        combined.addcmul_(a.unsqueeze(1), scales[i])
    return combined


def _grad_of_map(logits: Tensor, problem: _Problem, grad: Tensor) -> Tensor:
    """dLoss/dmap [B, C, N] from dLoss/dstats [B, 1 + 2C] of that map; `logits` is the map itself."""
    num_classes, plan, pixels = logits.shape[1], problem.plan, problem.pixels
    g_ce, g_i, g_q = (g.unsqueeze(2) for g in grad.split([1, num_classes, num_classes], dim=1))  # [B, 1 or C, 1]
    a, b = (f.view(1, -1, 1) for f in problem.factors)
    y = pixels.one_hot(num_classes)  # [B, C, N]
    y = y.to(logits.dtype) if y.is_floating_point() else y  # a float64 target makes no gradients of float64
    s = logits.sigmoid() if plan.sigmoid else logits.softmax(1)
    pull = g_i * y + (2 * g_q * s if plan.squared else g_q)
    share = a * y + b
    if plan.sigmoid:
        dice = s * (1 - s) * pull
        ce = (share + 1 - y.to(s.dtype)) * s - share
    else:
        dice = s * (pull - (s * pull).sum(1, keepdim=True))
        ce = share.sum(1, keepdim=True) * s - share
    ce = ce * g_ce if pixels.ce_weight is None else ce * (g_ce * pixels.ce_weight.unsqueeze(1))
    return ce + (dice if pixels.dice_weight is None else dice * pixels.dice_weight.unsqueeze(1))


def _unmix(
    spec: MapSpec,
    grad: Tensor,
    problem: _Problem,
    grad_scales: Sequence[Tensor],
    grad_values: Sequence[Tensor | None],
) -> None:
    """Add the gradients of one map [B, C, N] to those of its members and parameters."""
    scales, values = problem.scales, problem.values
    if spec.operator in ("orig", "add", "sub", "avg"):
        share = 1 / len(spec.members) if spec.operator == "avg" else 1.0
        for j, i in enumerate(spec.members):
            grad_scales[i].add_(grad, alpha=-1.0 if spec.operator == "sub" and j > 0 else share)
    elif spec.operator == "max":
        left = grad.clone()  # what no member has taken yet: the first that is the largest takes it
        top = _mix(spec, problem)
        for i in spec.members:
            is_top = (scales[i] == top) | scales[i].isnan()
            grad_scales[i].add_(left * is_top)
            left.masked_fill_(is_top, 0)
    elif spec.operator == "mul":
        is_bounded = problem.plan.bounded
        factors = [bounded(scales[i]) if is_bounded else scales[i] for i in spec.members]
        for j, i in enumerate(spec.members):
            partial = grad.clone()
            for k, factor in enumerate(factors):
                if k != j:
                    partial.mul_(factor)
            if is_bounded:
                partial.mul_(torch.hypot(torch.ones_like(partial), scales[i] / MUL_BOUND).pow_(-3))
            grad_scales[i].add_(partial)
    elif spec.operator == "cat":
        weight, grad_weight, grad_bias = values[0], grad_values[0], grad_values[1]
        assert weight is not None and grad_weight is not None and grad_bias is not None
        grad_bias[spec.subset] += grad.sum((0, 2))
        for j, i in enumerate(spec.members):
            grad_scales[i].add_(weight[spec.first_pair + j].t() @ grad)
            grad_weight[spec.first_pair + j] += (grad @ scales[i].transpose(1, 2)).sum(0)
    else:
        weight, grad_weight, grad_bias = values[2], grad_values[2], grad_values[3]
        assert weight is not None and grad_weight is not None and grad_bias is not None
        attention = _attention(spec, scales, values)  # [|S|, B, N]
        along = torch.stack([(grad * scales[i]).sum(1) for i in spec.members])  # dLoss/dattention
        grad_score = attention * (along - (attention * along).sum(0))
        for j, i in enumerate(spec.members):
            pair = spec.first_pair + j
            grad_scales[i].addcmul_(attention[j].unsqueeze(1), grad)
            grad_scales[i].add_(grad_score[j].unsqueeze(1) * weight[pair].view(1, -1, 1))
            # Not einsum: as one long dot product it loses four digits in float32.
            grad_weight[pair] += (grad_score[j].unsqueeze(1) * scales[i]).sum((0, 2))
            grad_bias[pair] += grad_score[j].sum()


def _adjoint(grad: Tensor, like: Tensor, full: torch.Size) -> Tensor:
    """Adjoint of `upsample`: [B, C, N] at full size -> [B, C, *native]."""
    grad = grad.view(*grad.shape[:2], *full)
    if like.shape == grad.shape:
        return grad
    if torch.are_deterministic_algorithms_enabled():
        return _repeatable_adjoint(grad, like.shape[2:])
    axes = len(full)
    return _ADJOINT[axes](grad, list(full), list(like.shape), False, *[None] * axes)


def _repeatable_adjoint(grad: Tensor, native: Sequence[int]) -> Tensor:
    """The same [B, C, *full] -> [B, C, *native] axis by axis, in the same order every time: torch's own is not on CUDA.

    By index_add_, which torch promises to make repeatable, rather than by matrix products: no matrix as large as an
    axis squared, none of the digits that tf32 leaves out, and no CUBLAS_WORKSPACE_CONFIG to be set.
    """
    # The axis that shrinks most comes first, so that the others have less to do.
    for axis in sorted(range(len(native)), key=lambda i: native[i] / grad.shape[2 + i]):
        dim, size = 2 + axis, native[axis]
        full = grad.shape[dim]
        if size == full:
            continue
        low, high, upper = neighbours(full, size, grad)
        upper = upper.view(-1, *[1] * (grad.dim() - 1 - dim))
        out = grad.new_zeros(*grad.shape[:dim], size, *grad.shape[dim + 1 :])
        out.index_add_(dim, low, grad * (1 - upper))
        out.index_add_(dim, high, grad * upper)
        grad = out
    return grad
