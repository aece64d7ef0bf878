"""`map_stats`: the one differentiable operation, as torch.library ops and one autograd Function over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.forward_ad import unpack_dual

from .backends import choose, named
from .checks import (
    check_ce_weight,
    check_logits,
    check_parameters,
    check_rule,
    check_target,
    check_weight_map,
    fitting_rule,
)
from .plan import MixPlan
from .reference import compute_dtype
from .target import Target, TargetRule

_INPUTS = (
    "Tensor[] logits, Tensor target, Tensor? weight_map, Tensor? ce_weight, Tensor? cat_weight, Tensor? cat_bias, "
    "Tensor? awf_weight, Tensor? awf_bias, str plan, str rule, str impl"
)


def _forward(
    logits: list[Tensor],
    target: Tensor,
    weight_map: Tensor | None,
    ce_weight: Tensor | None,
    cat_weight: Tensor | None,
    cat_bias: Tensor | None,
    awf_weight: Tensor | None,
    awf_bias: Tensor | None,
    plan: str,
    rule: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    parameters = (cat_weight, cat_bias, awf_weight, awf_bias)
    whole = _target(logits, target, weight_map, ce_weight, plan, rule)
    with torch.autocast(target.device.type, enabled=False):  # inside a region of AMP, sums must stay float32
        return named(impl).forward(logits, whole, parameters, MixPlan.from_key(plan))


def _backward(
    grad_stats: Tensor,
    logits: list[Tensor],
    target: Tensor,
    weight_map: Tensor | None,
    ce_weight: Tensor | None,
    cat_weight: Tensor | None,
    cat_bias: Tensor | None,
    awf_weight: Tensor | None,
    awf_bias: Tensor | None,
    plan: str,
    rule: str,
    impl: str,
) -> list[Tensor]:
    parameters = (cat_weight, cat_bias, awf_weight, awf_bias)
    whole = _target(logits, target, weight_map, ce_weight, plan, rule)
    with torch.autocast(target.device.type, enabled=False):
        grads, parameter_grads = named(impl).backward(grad_stats, logits, whole, parameters, MixPlan.from_key(plan))
    outputs = [_as_laid_out(g, z) for g, z in zip(grads, logits, strict=True)]
    for gradient, parameter in zip(parameter_grads, parameters, strict=True):
        if parameter is None:
            outputs.append(logits[0].new_empty(0))
        else:
            assert gradient is not None
            outputs.append(_as_laid_out(gradient, parameter))
    return outputs


def _target(
    logits: list[Tensor], labels: Tensor, weight_map: Tensor | None, ce_weight: Tensor | None, plan: str, rule: str
) -> Target:
    dense, exclusive = labels.dim() == logits[0].dim(), not MixPlan.from_key(plan).sigmoid
    return Target(labels, dense, weight_map, ce_weight, TargetRule.from_key(rule), exclusive)


def _as_laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in dtype and strides of torch.empty_like(like), copied only if it is not so already."""
    out = torch.empty_like(like)
    same = gradient.dtype == out.dtype and gradient.stride() == out.stride()
    return gradient if same else out.copy_(gradient)


def _fake_forward(
    logits: list[Tensor],
    target: Tensor,
    weight_map: Tensor | None,
    ce_weight: Tensor | None,
    cat_weight: Tensor | None,
    cat_bias: Tensor | None,
    awf_weight: Tensor | None,
    awf_bias: Tensor | None,
    plan: str,
    rule: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, classes = logits[0].shape[:2]
    dtype = compute_dtype(logits[0].dtype)
    stats = logits[0].new_empty((batch, MixPlan.from_key(plan).num_maps, 1 + 2 * classes), dtype=dtype)
    return stats, logits[0].new_empty((batch, 1 + classes), dtype=dtype)


def _fake_backward(
    grad_stats: Tensor,
    logits: list[Tensor],
    target: Tensor,
    weight_map: Tensor | None,
    ce_weight: Tensor | None,
    cat_weight: Tensor | None,
    cat_bias: Tensor | None,
    awf_weight: Tensor | None,
    awf_bias: Tensor | None,
    plan: str,
    rule: str,
    impl: str,
) -> list[Tensor]:
    parameters = (cat_weight, cat_bias, awf_weight, awf_bias)
    empty = [logits[0].new_empty(0) if p is None else torch.empty_like(p) for p in parameters]
    return [*(torch.empty_like(z) for z in logits), *empty]


_forward_op = torch.library.custom_op(
    "lomix_fast::map_stats_forward", _forward, mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "lomix_fast::map_stats_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_stats, {_INPUTS}) -> Tensor[]",
)
_forward_op.register_fake(_fake_forward)
_backward_op.register_fake(_fake_backward)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    """The autograd formula of the backward op: there is none.

    Not once_differentiable, whose error is beside the path from gradients to inputs: torch.autograd.grad walks that
    path alone and would leave second derivatives out in silence.
    """
    raise RuntimeError(
        "lomix_fast: got a second derivative (a gradient of gradients made with create_graph=True), expected first "
        "derivatives only, which is what the fused passes compute; detach these gradients, or compute the part that is "
        "differentiated twice with a loss in plain PyTorch"
    )


_backward_op.register_autograd(_refuse_second_derivative)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise where something other than plain autograd goes through the loss; fused passes know nothing of it."""
    # torch.compile traces the first of these to a constant, and torch refuses the second there by itself.
    if torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling()
        and any(t is not None and (is_legacy_batchedtensor(t) or unpack_dual(t).tangent is not None) for t in tensors)
    ):
        raise RuntimeError(
            "lomix_fast: got a transform of torch.func (grad, vjp, jvp, vmap, jacrev, ...), a batch of gradients "
            "(is_grads_batched=True) or forward-mode AD, expected plain autograd; use loss.backward() or "
            "torch.autograd.grad, and a loop in place of vmap (torch.func.functional_call works)"
        )


# Tensors before the logits: the target, its two weights, W, b, u, v.
_LEADING = 7


class MapStatsFunction(torch.autograd.Function):
    """The one gradient path: ops forward and backward, the inputs saved and nothing else.

    `MapStatsFunction.apply(plan, used, rule, impl, target, weight_map, ce_weight, W, b, u, v, *logits)` returns (stats,
    target_stats) as `map_stats` does, without any check of its arguments; `plan` is the key of a MixPlan and `used` its
    `used_scales` (torch.compile of torch 2.8 cannot take the plan itself), `rule` the key of a TargetRule.
    Differentiable once; a second derivative raises RuntimeError.
    """

    # The tensors come as one starred argument: with each named, dynamo (torch 2.13) mistakes the plan for ctx in
    # graphs without gradient when the number of arguments equals that of the parameters, as it does at L = 2.
    @staticmethod
    def forward(
        ctx: Any, plan: str, used: tuple[int, ...], rule: str, impl: str, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Statistics of all maps from (target, weight_map, ce_weight, W, b, u, v, *logits); shapes as `map_stats`."""
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.used, ctx.rule, ctx.impl = plan, used, rule, impl
        target, *others = tensors[:_LEADING]
        stats, target_stats = torch.ops.lomix_fast.map_stats_forward(
            list(tensors[_LEADING:]), target, *others, plan, rule, impl
        )
        ctx.mark_non_differentiable(target_stats)
        return stats, target_stats

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of W, b, u, v and the logits from dLoss/dstats [B, M, 1 + 2C]."""
        _refuse_transforms(grad_stats)
        saved = ctx.saved_tensors  # asked for once: torch.utils.checkpoint recomputes at the first time only
        target, *others = saved[:_LEADING]
        logits = list(saved[_LEADING:])
        gradients = torch.ops.lomix_fast.map_stats_backward(
            grad_stats, logits, target, *others, ctx.plan, ctx.rule, ctx.impl
        )
        scales = [gradients[i] if i in ctx.used else None for i in range(len(logits))]
        parameters = others[-4:]
        needed = [None if p is None else g for p, g in zip(parameters, gradients[len(logits) :], strict=True)]
        return None, None, None, None, None, None, None, *needed, *scales


def map_stats(
    logits: Sequence[Tensor],
    target: Tensor,
    plan: MixPlan,
    *,
    weight_map: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weighted_ce: bool = True,
    cat_weight: Tensor | None = None,
    cat_bias: Tensor | None = None,
    awf_weight: Tensor | None = None,
    awf_bias: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sufficient statistics of every supervised map, differentiable in logits and parameters.

    The logits are interpolated to the size of the target (linear in every axis, align_corners=False), mixed as the plan
    says, passed through softmax over the classes (or the sigmoid of each) and summed over the pixels of each sample.
    Compiled backends do all of that, and its gradient, without storing any map.

    Args:
        logits: L tensors [B, C, *native_l], COARSEST first; float16, bfloat16, float32 or float64, 1 to 3 spatial axes,
            any strides; never written to.
        target: labels [B, *full] or [B, 1, *full] in [0, C): any integer dtype, bool, or whole-number floats. Or one
            value from 0 to 1 a class, [B, C, *full], of any such dtype: regions of a plan with `sigmoid` (which for
            C = 1 may also come as [B, *full]), soft or one-hot labels of one without.
        plan: `MixPlan.create(L, ...)`.
        weight_map: weight of each pixel, [B, *full] or [B, 1, *full], float or bool (a mask), at least 0; not
            differentiated.
        ce_weight: weight of each class in cross-entropy, float [C], at least 0; under sigmoid that of its positives
            (`pos_weight` of torch.nn.BCEWithLogitsLoss).
        ignore_index: pixels with this label have weight 0 in all sums, and it may lie outside [0, C).
        label_smoothing: 0 to 1, of cross-entropy alone, as torch.nn.CrossEntropyLoss has it; not under sigmoid.
        weighted_ce: whether weight_map weighs cross-entropy as well as Dice.
        cat_weight: W [K, C, C] (pair, out class, in class), given exactly when the plan has "cat".
        cat_bias: b [S, C], likewise.
        awf_weight: u [K, C], given exactly when the plan has "awf".
        awf_bias: v [K], likewise.
        impl: "auto", or a name from `available_backends`; a named backend that cannot run raises.

    Returns:
        stats [B, M, 1 + 2C], with w the weight of a pixel and y_c its target: the sum of w times cross-entropy (under
        sigmoid binary cross-entropy, summed over classes); I_c = sum of w s_c y_c; Q_c = sum of w s_c^2 (or of w s_c
        when `plan.squared` is false). target_stats [B, 1 + C], not differentiable: what the cross-entropy of the
        sample is to be divided by (the sum of weights; of w ce_weight[y] for class numbers under softmax), and the
        sum of w y_c^2 (or of w y_c) of each class. Both float32, or float64 for float64 logits. Second derivatives
        raise.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message; nothing has run by then. A label
            outside [0, C), or a value outside 0 to 1, raises ValueError on CPU and makes the statistics NaN on other
            devices, where raising would need a sync (LOMIX_FAST_DEBUG=1 raises there too).
        RuntimeError: the named backend cannot run on this device.

    Source: SPEC of LoMix (Rahman and Marculescu, NeurIPS 2025), with the sums of its CE and Dice as output; weights
    and smoothing follow torch.nn.CrossEntropyLoss.
    """
    if not isinstance(plan, MixPlan):
        raise TypeError(
            f"plan: got {type(plan).__name__}, expected a MixPlan; make one with MixPlan.create(num_scales)"
        )
    maps = check_logits(logits)
    if len(maps) != plan.num_scales:
        raise ValueError(f"logits: got {len(maps)} tensors, expected {plan.num_scales} as the plan has scales")
    rule = check_rule(ignore_index, label_smoothing, weighted_ce, plan.sigmoid)
    labels = check_target(target, maps[0], plan.sigmoid, ignore_index)
    rule = fitting_rule(rule, labels)
    weights = check_weight_map(weight_map, labels, maps[0])
    class_weights = check_ce_weight(ce_weight, maps[0])
    given = {"cat_weight": cat_weight, "cat_bias": cat_bias, "awf_weight": awf_weight, "awf_bias": awf_bias}
    parameters = check_parameters(given, plan, maps[0])
    _refuse_transforms(*parameters, *maps)
    backend = choose(impl, maps[0].device)
    return MapStatsFunction.apply(
        plan.key, plan.used_scales, rule.key, backend, labels, weights, class_weights, *parameters, *maps
    )
