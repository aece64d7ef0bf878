"""The truth: SPEC.md in readable PyTorch, any dtype, any device, differentiated by autograd.

Every backend is tested against this file evaluated in float64. It makes every map at full size and keeps what autograd
asks for, so it is slow and large on purpose; `lomix_fast.eager` and the compiled backends are for use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import poison
from .plan import MUL_BOUND, MixPlan
from .target import Pixels, Target, ce_factors, read_target, target_stats


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of products, softmax and sums for logits of `dtype`: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upsample(logits: Tensor, full: Sequence[int]) -> Tensor:
    """Interpolate logits [B, C, *native] to [B, C, *full]: linear in every axis, align_corners=False, no antialias.

    The same tensor is returned when native equals full. What torch.nn.functional.interpolate with `size` computes, but
    a neighbour without weight is not read, be it infinite, and places are exact.
    """
    for dim, size in reversed(list(enumerate(full, start=2))):  # whole rows are copied where there are most of them
        if logits.shape[dim] == size:
            continue
        low, high, upper = neighbours(size, logits.shape[dim], logits)
        upper = upper.view(-1, *[1] * (logits.dim() - 1 - dim))
        enlarged = logits.index_select(dim, low).mul_(1 - upper)
        logits = enlarged.addcmul_(logits.index_select(dim, high), upper)
    return logits


def neighbours(full: int, native: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the pixels of an axis read of a native axis, each [full] on the device of `like`.

    Returns:
        low, high: int64, the native coordinates; the same where only one has weight.
        upper: weight of `high` in the dtype of `like`, inside (0, 1); that of `low` is the rest.
    """
    out = torch.arange(full, device=like.device)
    place = ((2 * out + 1) * native - full).clamp_(min=0)  # in units of 1 / (2 full): whole numbers, so exact
    low = (place // (2 * full)).clamp_(max=native - 1)
    rest = (place - low * (2 * full)).masked_fill_(low == native - 1, 0)
    alone = rest == 0
    return low, low + ~alone, (rest.to(like.dtype) / (2 * full)).masked_fill_(alone, 0.5)


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
            factors = [bounded(p) for p in members] if plan.bounded else members
            product = factors[0]
            for factor in factors[1:]:
                product = product * factor
            yield product
        elif spec.operator == "sub":
            yield members[0] - torch.stack(members[1:]).sum(0)
        elif spec.operator == "avg":
            yield torch.stack(members).mean(0)
        elif spec.operator == "max":
            yield torch.stack(members).max(0).values  # the first of equals is the one that learns
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


def bounded(logits: Tensor) -> Tensor:
    """P / sqrt(1 + (P / MUL_BOUND)^2): the factor of a bounded product."""
    return logits / torch.hypot(torch.ones_like(logits), logits / MUL_BOUND)


def _weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over the pixels: values [B, C, *full], weight [B, *full] or None -> [B, C]."""
    return (values if weight is None else values * weight.unsqueeze(1)).flatten(2).sum(2)


def stats_of_map(logits: Tensor, pixels: Pixels, factors: tuple[Tensor, Tensor], plan: MixPlan) -> Tensor:
    """Sums of one map over its pixels.

    Args:
        logits: one map [B, C, *full].
        pixels: the target.
        factors: (a [C], b [C]), see `ce_factors`.
        plan: whether probabilities s are a softmax or sigmoids, and whether Dice squares them.

    Returns:
        [B, 1 + 2C]: the sum of cross-entropy, I_c = sum of w s_c y_c, Q_c = sum of w s_c^2 or w s_c. With
        t_c = a_c y_c + b_c a pixel's cross-entropy is the sum over classes of -t_c log s_c under softmax, and of
        -t_c log s_c - (1 - y_c) log(1 - s_c) under sigmoid.
    """
    num_classes = logits.shape[1]
    y = pixels.one_hot(num_classes).to(logits.dtype)  # [B, C, *full]
    a, b = (f.view(-1, *[1] * (logits.dim() - 2)) for f in factors)  # [C, 1...]
    weight = 1 if pixels.ce_weight is None else pixels.ce_weight.unsqueeze(1)
    share = (a * y + b) * weight  # of each class in cross-entropy
    if plan.sigmoid:
        s = logits.sigmoid()
        # log(1 + e^-|x|), and what |x| adds on the wrong side: one of the last two terms is 0, so no two large ones
        # meet, and softplus, which is x itself above 20, is not asked there. At x = 0 autograd finds the right slope.
        rest, distance = (1 - y) * weight, logits.abs()
        ce = F.softplus(-distance).mul_(rest + share)
        ce.addcmul_(rest, distance + logits, value=0.5).addcmul_(share, distance - logits, value=0.5)
    else:
        log_s = F.log_softmax(logits, dim=1)
        s = log_s.exp()
        # A class without a share has no part in the loss, not even where its logit is minus infinity: 0 log 0 = 0. What
        # is no number stays so.
        ce = -share * log_s.masked_fill((share == 0) & (log_s == -math.inf), 0)
    return torch.cat(
        [
            ce.flatten(1).sum(1, keepdim=True),  # [B, 1]
            _weighted_sum(s * y, pixels.dice_weight),  # [B, C]
            _weighted_sum(s * s if plan.squared else s, pixels.dice_weight),  # [B, C]
        ],
        dim=1,
    )


def map_stats_reference(
    logits: Sequence[Tensor],
    target: Target,
    plan: MixPlan,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sufficient statistics of all maps, in plain PyTorch under autograd.

    Args:
        logits: L tensors [B, C, *native_l], coarsest first, float16, bfloat16, float32 or float64.
        target: labels and weights.
        plan: which maps.
        cat_weight, cat_bias, awf_weight, awf_bias: W [K, C, C], b [S, C], u [K, C], v [K], as the plan needs.

    Returns:
        stats [B, M, 1 + 2C], differentiable; target_stats [B, 1 + C], see `target_stats`. Both in float32, or float64
        for float64 logits.

    Raises:
        ValueError: on CPU, a label that is no class or not a whole number, or a dense value outside 0 to 1.
    """
    dtype = compute_dtype(logits[0].dtype)
    num_classes = logits[0].shape[1]
    pixels, factors = read_target(target, num_classes, dtype), ce_factors(target, num_classes, dtype)
    scales = [upsample(z.to(dtype), target.full) for z in logits]
    parameters = [None if p is None else p.to(dtype) for p in (cat_weight, cat_bias, awf_weight, awf_bias)]
    table = [stats_of_map(m, pixels, factors, plan) for m in mixed_maps(scales, plan, *parameters)]
    counts = target_stats(pixels, target.ce_weight, num_classes, dtype, plan.squared)
    return poison(torch.stack(table, dim=1), pixels.invalid), counts


def forward(
    logits: Sequence[Tensor], target: Target, parameters: Sequence[Tensor | None], plan: MixPlan
) -> tuple[Tensor, Tensor]:
    """Forward pass with the signature all backends share; see `lomix_fast.backends`."""
    return map_stats_reference(logits, target, plan, *parameters)


def backward(
    grad_stats: Tensor,
    logits: Sequence[Tensor],
    target: Target,
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
