"""The truth: SPEC.md in readable PyTorch, any dtype, any device, differentiated by autograd.

Every backend is tested against this file evaluated in float64. It makes every map at full size and keeps what autograd
asks for, so it is slow and large on purpose; `lomix_fast.eager` and the compiled backends are for use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import class_index, poison
from .plan import MixPlan

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of products, softmax and sums for logits of `dtype`: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upsample(logits: Tensor, full: Sequence[int]) -> Tensor:
    """Interpolate logits [B, C, *native] to [B, C, *full]: linear in every axis, align_corners=False, no antialias.

    The same tensor is returned when native equals full. Follows torch.nn.functional.interpolate with `size`.
    """
    if tuple(logits.shape[2:]) == tuple(full):
        return logits
    return F.interpolate(logits, size=tuple(full), mode=_INTERPOLATION[logits.dim() - 2], align_corners=False)


def mixed_maps(
    scales: Sequence[Tensor],
    plan: MixPlan,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the M maps of the plan, one by one, each [B, C, *full].

    Args:
        scales: L tensors P_l [B, C, *full], coarsest first, already at full size.
        plan: which maps.
        cat_weight: W [K, C, C], out channel before in channel; needed when the plan has "cat".
        cat_bias: b [S, C]; needed when the plan has "cat".
        awf_weight: u [K, C]; needed when the plan has "awf".
        awf_bias: v [K]; needed when the plan has "awf".

    Source: paper section on the combinatorial mutation module; on raw logits as the released code does.
    """
    for spec in plan.maps:
        members = [scales[i] for i in spec.members]  # each [B, C, *full]
        pairs = range(spec.first_pair, spec.first_pair + len(members))
        if spec.operator == "orig":
            yield members[0]
        elif spec.operator == "add":
            yield torch.stack(members).sum(0)
        elif spec.operator == "mul":
            product = members[0]
            for member in members[1:]:
                product = product * member
            yield product
        elif spec.operator == "cat":
            assert cat_weight is not None and cat_bias is not None
            projected = [torch.einsum("oc,bc...->bo...", cat_weight[k], p) for k, p in zip(pairs, members, strict=True)]
            bias = cat_bias[spec.subset].view(1, -1, *[1] * (members[0].dim() - 2))  # [1, C, 1...]
            yield torch.stack(projected).sum(0) + bias
        else:
            assert awf_weight is not None and awf_bias is not None
            scores = [
                torch.einsum("c,bc...->b...", awf_weight[k], p) + awf_bias[k]
                for k, p in zip(pairs, members, strict=True)
            ]  # each [B, *full]
            attention = torch.stack(scores).softmax(0)  # [|S|, B, *full]
            yield torch.stack([a.unsqueeze(1) * p for a, p in zip(attention, members, strict=True)]).sum(0)


def stats_of_map(logits: Tensor, index: Tensor, squared: bool) -> Tensor:
    """Sums of one map over its pixels.

    Args:
        logits: one map [B, C, *full].
        index: class numbers [B, *full], int64, all in [0, C).
        squared: sum s^2 rather than s in the last group.

    Returns:
        [B, 1 + 2C]: sum of -log s_y; I_c = sum of s_c where y == c; Q_c = sum of s_c^2 or s_c.
    """
    log_s = F.log_softmax(logits, dim=1)  # [B, C, *full]
    s = log_s.exp()
    one_hot = F.one_hot(index, logits.shape[1]).movedim(-1, 1)  # [B, C, *full]
    ce = -log_s.gather(1, index.unsqueeze(1)).flatten(1).sum(1, keepdim=True)  # [B, 1]
    intersection = (s * one_hot).flatten(2).sum(2)  # [B, C]
    denominator = (s * s if squared else s).flatten(2).sum(2)  # [B, C]
    return torch.cat([ce, intersection, denominator], dim=1)


def count_labels(index: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Pixels in all and per class: index [B, *full] in [0, C) -> [B, 1 + C]."""
    flat = index.flatten(1)  # [B, N]
    counts = torch.zeros(flat.shape[0], num_classes, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    total = torch.full_like(counts[:, :1], flat.shape[1])
    return torch.cat([total, counts], dim=1).to(dtype)


def map_stats_reference(
    logits: Sequence[Tensor],
    target: Tensor,
    plan: MixPlan,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sufficient statistics of all maps, in plain PyTorch under autograd.

    Args:
        logits: L tensors [B, C, *native_l], coarsest first, float16, bfloat16, float32 or float64.
        target: labels [B, *full], any integer type, bool, or whole-number floats.
        plan: which maps.
        cat_weight, cat_bias, awf_weight, awf_bias: W [K, C, C], b [S, C], u [K, C], v [K], as the plan needs.

    Returns:
        stats [B, M, 1 + 2C], differentiable; target_stats [B, 1 + C] (pixels in all, pixels of each class). Both in
        float32, or float64 for float64 logits.

    Raises:
        ValueError: on CPU, a label outside [0, C) or not a whole number.
    """
    dtype = compute_dtype(logits[0].dtype)
    full = target.shape[1:]
    num_classes = logits[0].shape[1]
    index, invalid = class_index(target, num_classes)
    scales = [upsample(z.to(dtype), full) for z in logits]
    parameters = [None if p is None else p.to(dtype) for p in (cat_weight, cat_bias, awf_weight, awf_bias)]
    table = [stats_of_map(m, index, plan.squared) for m in mixed_maps(scales, plan, *parameters)]
    return poison(torch.stack(table, dim=1), invalid), count_labels(index, num_classes, dtype)


def forward(
    logits: Sequence[Tensor], target: Tensor, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    return map_stats_reference(logits, target, plan, *parameters)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    parameters: Sequence[Tensor | None],
    plan: MixPlan,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Backward pass with the signature all backends share; autograd through `map_stats_reference`."""
    given = [p for p in parameters if p is not None]

    def stats_of(*inputs: Tensor) -> Tensor:
        rest = iter(inputs[len(logits) :])
        filled = [None if p is None else next(rest) for p in parameters]
        return map_stats_reference(inputs[: len(logits)], target, plan, *filled)[0]

    # torch.func.vjp rather than torch.autograd.grad: this runs inside a registered op, below autograd's dispatch key.
    vjp = torch.func.vjp(stats_of, *logits, *given)[1]
    gradients = vjp(grad_stats.to(compute_dtype(logits[0].dtype)))
    rest = iter(gradients[len(logits) :])
    # An `add` of full-size scales hands the same tensor to all of them, and outputs of an op may not share memory.
    scales = [g.clone() for g in gradients[: len(logits)]]
    return scales, [None if p is None else next(rest) for p in parameters]
