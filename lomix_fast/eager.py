"""One map at a time in plain PyTorch, recomputed in the backward pass: memory independent of the number of maps.

Runs on any device torch knows. Holds the L interpolated scales and a handful of map-sized temporaries, never M maps.
The gradients are the closed forms of DESIGN.md rather than autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .labels import class_index, poison
from .plan import MapSpec, MixPlan
from .reference import compute_dtype, count_labels, stats_of_map, upsample

_ADJOINT = {
    1: torch.ops.aten.upsample_linear1d_backward,
    2: torch.ops.aten.upsample_bilinear2d_backward,
    3: torch.ops.aten.upsample_trilinear3d_backward,
}


def forward(
    logits: Sequence[Tensor], target: Tensor, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    scales, index, invalid, values = _prepare(logits, target, parameters, plan)
    batch, num_classes, _ = scales[0].shape
    stats = scales[0].new_empty(batch, plan.num_maps, 1 + 2 * num_classes)
    for m, spec in enumerate(plan.maps):
        stats[:, m] = stats_of_map(_mix(spec, scales, values), index, plan.squared)
    return poison(stats, invalid), count_labels(index, num_classes, scales[0].dtype)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share."""
    scales, index, invalid, values = _prepare(logits, target, parameters, plan)
    grad_stats = poison(grad_stats.to(scales[0].dtype), invalid)
    grad_scales = [torch.zeros_like(p) if i in plan.used_scales else p for i, p in enumerate(scales)]
    grad_values = [None if p is None else torch.zeros_like(p) for p in values]
    for m, spec in enumerate(plan.maps):
        grad_map = _grad_of_map(_mix(spec, scales, values), index, grad_stats[:, m], plan.squared)
        _unmix(spec, grad_map, scales, values, grad_scales, grad_values)
    grads = [
        _adjoint(g, z, target.shape[1:]) if i in plan.used_scales else torch.zeros_like(z)
        for i, (g, z) in enumerate(zip(grad_scales, logits, strict=True))
    ]
    return grads, grad_values


def _prepare(
    logits: Sequence[Tensor], target: Tensor, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[list[Tensor], Tensor, Tensor | None, list[Tensor | None]]:
    """Scales as [B, C, N], labels as [B, N], parameters in the compute dtype. Unused scales take no memory."""
    dtype = compute_dtype(logits[0].dtype)
    index, invalid = class_index(target, logits[0].shape[1])
    nothing = torch.zeros((), dtype=dtype, device=target.device).expand(*logits[0].shape[:2], target.shape[1:].numel())
    scales = [
        upsample(z.to(dtype), target.shape[1:]).flatten(2) if i in plan.used_scales else nothing
        for i, z in enumerate(logits)
    ]
    return scales, index.flatten(1), invalid, [None if p is None else p.to(dtype) for p in parameters]


def _attention(spec: MapSpec, scales: Sequence[Tensor], values: Sequence[Tensor | None]) -> Tensor:
    """Softmax over members of u . P + v: [|S|, B, N]."""
    weight, bias = values[2], values[3]
    assert weight is not None and bias is not None
    scores = [
        torch.einsum("c,bcn->bn", weight[spec.first_pair + j], scales[i]) + bias[spec.first_pair + j]
        for j, i in enumerate(spec.members)
    ]
    return torch.stack(scores).softmax(0)


def _mix(spec: MapSpec, scales: Sequence[Tensor], values: Sequence[Tensor | None]) -> Tensor:
    """One map [B, C, N] from the scales [B, C, N]."""
    first, *others = spec.members
    if spec.operator == "orig":
        return scales[first]
    if spec.operator in ("add", "mul"):
        combined = scales[first].clone()
        for i in others:
            combined = combined.add_(scales[i]) if spec.operator == "add" else combined.mul_(scales[i])
        return combined
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


def _grad_of_map(logits: Tensor, index: Tensor, grad: Tensor, squared: bool) -> Tensor:
    """dLoss/dmap [B, C, N] from dLoss/dstats [B, 1 + 2C] of that map; `logits` is the map itself."""
    num_classes = logits.shape[1]
    g_ce, g_i, g_q = grad.split([1, num_classes, num_classes], dim=1)  # [B, 1], [B, C], [B, C]
    s = logits.softmax(1)
    label = index.unsqueeze(1)  # [B, 1, N]
    t = 2 * g_q.unsqueeze(2) * s if squared else g_q.unsqueeze(2).expand_as(s).clone()
    t.scatter_add_(1, label, g_i.gather(1, index).unsqueeze(1))
    out = s * (t - (s * t).sum(1, keepdim=True) + g_ce.unsqueeze(2))
    return out.scatter_add_(1, label, -g_ce.unsqueeze(2).expand(-1, -1, index.shape[1]))


def _unmix(
    spec: MapSpec,
    grad: Tensor,
    scales: Sequence[Tensor],
    values: Sequence[Tensor | None],
    grad_scales: Sequence[Tensor],
    grad_values: Sequence[Tensor | None],
) -> None:
    """Add the gradients of one map [B, C, N] to those of its members and parameters."""
    if spec.operator in ("orig", "add"):
        for i in spec.members:
            grad_scales[i].add_(grad)
    elif spec.operator == "mul":
        for i in spec.members:
            partial = grad.clone()
            for j in spec.members:
                if j != i:
                    partial.mul_(scales[j])
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
    axes = len(full)
    return _ADJOINT[axes](grad, list(full), list(like.shape), False, *[None] * axes)
