"""Checks of everything a user passes, made before any work starts. No data is read here, so nothing waits for a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .caller import stacklevel_outside
from .plan import MAX_SCALES, MixPlan
from .target import TargetRule

# Every backend keeps class numbers in floats somewhere; kMostClasses in csrc/inputs.h.
MOST_CLASSES = 2**24
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Whole numbers up to these are exact.
_WHOLE = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}


def plain(tensor: Any) -> Any:
    """Unwrap a MONAI MetaTensor; everything else is returned as it is."""
    return tensor.as_tensor() if type(tensor).__name__ == "MetaTensor" else tensor


def has_numbers(tensor: Tensor) -> bool:
    """Whether there is anything to read in a tensor: not on the meta device, nor inside a FakeTensorMode."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a sparse or nested tensor."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        way_out = "pad it with torch.nested.to_padded_tensor" if tensor.is_nested else "call .to_dense()"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor; {way_out} first")


def check_logits(logits: Any) -> list[Tensor]:
    """Return the logits as a list of plain tensors, or raise naming what is wrong.

    Args:
        logits: list or tuple of L tensors [B, C, *native] with 1 to 3 spatial axes; the same B, C, dtype, device.

    Raises:
        TypeError: not a list or tuple of floating-point tensors.
        ValueError: empty, or tensors that do not fit together.
    """
    if not isinstance(logits, (list, tuple)):
        way_out = "; for scales stacked along axis 1 pass logits.unbind(1)" if isinstance(logits, Tensor) else ""
        raise TypeError(
            f"logits: got {type(logits).__name__}, expected a list or tuple of [B, C, *native] tensors{way_out}"
        )
    if not logits:
        raise ValueError("logits: got an empty list, expected at least one [B, C, *native] tensor")
    maps = [plain(z) for z in logits]
    for i, z in enumerate(maps):
        if not isinstance(z, Tensor):
            raise TypeError(f"logits[{i}]: got {type(z).__name__}, expected a torch.Tensor")
        if z.dtype not in FLOAT_DTYPES:
            raise TypeError(f"logits[{i}]: got dtype {z.dtype}, expected one of {FLOAT_DTYPES}")
        check_dense(f"logits[{i}]", z)
        if not 3 <= z.dim() <= 5:
            raise ValueError(
                f"logits[{i}]: got shape {tuple(z.shape)}, expected [B, C, *native] with 1, 2 or 3 spatial axes"
            )
        if z.shape[1] < 1 or any(n < 1 for n in z.shape[2:]):
            raise ValueError(f"logits[{i}]: got shape {tuple(z.shape)}, expected at least one class and one pixel")
        if z.shape[1] > MOST_CLASSES:
            raise ValueError(f"logits[{i}]: got {z.shape[1]} classes, expected at most {MOST_CLASSES}")
    first = maps[0]
    for i, z in enumerate(maps[1:], start=1):
        for what, got, want in (
            ("rank", z.dim(), first.dim()),
            ("batch size", z.shape[0], first.shape[0]),
            ("number of classes", z.shape[1], first.shape[1]),
            ("dtype", z.dtype, first.dtype),
            ("device", z.device, first.device),
        ):
            if got != want:
                way_out = "; convert all of them, with .float() or to the narrower type" if what == "dtype" else ""
                raise ValueError(f"logits[{i}]: got {what} {got}, expected {want} as logits[0] has{way_out}")
    return maps


def split_stack(logits: Any, stacked_dim: int | None) -> Any:
    """The scales of a tensor that holds them all along an axis, as a list; whatever else was given as it came.

    Args:
        logits: [B, L, C, *native] with stacked_dim=1, [L, B, C, *native] with 0; None says that there is no such axis.
    """
    logits = plain(logits)
    is_stack = stacked_dim is not None and isinstance(logits, Tensor) and logits.dim() > 3
    return list(logits.unbind(stacked_dim)) if is_stack else logits


def scales_or_map(logits: Any, target: Any, num_classes: int, num_scales: int, stacked_dim: int | None) -> Any:
    """Tell a stack of scales from one map: the list of its scales, or what was given as it came.

    Args:
        logits: list of tensors, a stack (see `split_stack`), or one map [B, C, *native].
        target: of the call, not checked yet; its number of axes helps to tell.
        num_classes, num_scales: C and L.
        stacked_dim: the axis of the scales, or None: a stack is refused.

    Raises:
        ValueError: a tensor that can be a stack while `stacked_dim` does not say so.
    """
    logits, target = plain(logits), plain(target)
    if isinstance(logits, Tensor):
        check_dense("logits", logits)
    if not isinstance(logits, Tensor) or logits.dim() < 4:
        return logits
    shape, axes = logits.shape, logits.dim()
    labels: Sequence[int] = target.shape if isinstance(target, Tensor) else ()
    # [B, *full] of a map has as many axes as [B, 1 or C, *full] of a stack.
    channels = labels[1] if len(labels) == axes - 1 else None
    is_one_slice = channels == 1 and shape[2] > 1  # no labels of a volume of several slices
    is_map = axes < 6 and shape[1] == num_classes and len(labels) != axes - 2 and not is_one_slice
    is_stack = shape[2] == num_classes and (channels is None or channels == 1 or channels == num_classes)
    is_stack = (is_stack or (is_one_slice and shape[1] == num_classes)) and shape[1] > 1 and len(labels) < axes
    # A network that stacks its scales in training returns one map in evaluation.
    if is_stack and stacked_dim is not None and (not is_map or shape[stacked_dim] == num_scales):
        return split_stack(logits, stacked_dim)
    if not is_stack or (is_map and shape[1] > MAX_SCALES):
        return logits
    way_out = f"; if it is one map of {num_classes} slices, pass target.unsqueeze(1)" if is_map else ""
    raise ValueError(
        f"logits: got one tensor {tuple(shape)} with target {tuple(labels)}, expected a list of [B, C, *native]; for "
        "scales stacked along axis 1 (MONAI DynUNet) pass logits.unbind(1), or make the criterion with stacked_dim=1"
        f"{way_out}"
    )


def full_target(target: Any, maps: Sequence[Tensor], order: str) -> Any:
    """Of a list of targets, one a scale as nnU-Net makes them, that of full size; whatever else was given as it came.

    Args:
        target: list or tuple of tensors [B, *size] or [B, channels, *size] in `order`, or something else.
        maps: the logits, checked, coarsest first.
        order: "coarse_to_fine" or "fine_to_coarse".

    Raises:
        ValueError: another number of targets than of logits, or sizes that are not theirs.
    """
    if not isinstance(target, (list, tuple)) or not target or not all(isinstance(plain(t), Tensor) for t in target):
        return target
    if len(target) != len(maps):
        raise ValueError(
            f"target: got a list of {len(target)} tensors, expected one tensor, or one for each of {len(maps)} logits"
        )
    axes = maps[0].dim() - 2
    coarse_first = list(target) if order == "coarse_to_fine" else list(reversed(target))
    sizes = [tuple(plain(t).shape[-axes:]) for t in coarse_first]
    wanted = [*(tuple(z.shape[2:]) for z in maps[:-1]), sizes[-1]]
    if sizes != wanted or not _grow(sizes):
        given = sizes if order == "coarse_to_fine" else sizes[::-1]
        scales = [tuple(z.shape[2:]) for z in (maps if order == "coarse_to_fine" else reversed(maps))]
        raise ValueError(
            f"target: got a list of sizes {given} with logits of sizes {scales} and order={order!r}, expected the same "
            "sizes, of which that of the finest scale may be larger; pass the target of full size alone, which is all "
            "that is used"
        )
    return coarse_first[-1]


def check_target(target: Any, first: Tensor, sigmoid: bool = False, ignore_index: int | None = None) -> Tensor:
    """Return the target as class numbers [B, *full] or one value a class [B, C, *full], or raise saying what is wrong.

    Args:
        target: [B, *full] or [B, 1, *full] class numbers, any integer dtype, bool, or floats that hold whole numbers
            (their values are looked at by the op itself, on the device); or [B, C, *full].
        first: one of the logits [B, C, *native], already checked.
        sigmoid: whether every class is a question of its own, which class numbers do not answer.
        ignore_index: a label that has to be told apart, which values of many classes cannot be.

    Raises:
        TypeError: not a tensor of such a dtype.
        ValueError: wrong rank, batch size, channels or device, no pixel, or a contradiction.
    """
    target = plain(target)
    if not isinstance(target, Tensor):
        way_out = "; of one a scale pass that of full size" if isinstance(target, (list, tuple)) else ""
        raise TypeError(f"target: got {type(target).__name__}, expected a torch.Tensor of labels{way_out}")
    check_dense("target", target)
    if target.dtype.is_complex or target.is_quantized or (target.is_floating_point() and target.dtype not in _WHOLE):
        raise TypeError(f"target: got dtype {target.dtype}, expected an integer, bool or whole-number float dtype")
    if target.requires_grad:
        raise ValueError(
            "target: got a tensor that requires a gradient, of which there is none; pass target.detach(), or if it is "
            "one of several maps of logits, all of them in one list"
        )
    axes, classes = first.dim() - 2, first.shape[1]
    has_channels = target.dim() == axes + 2
    if not has_channels and target.dim() != axes + 1:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected [B, *full] or [B, 1, *full] with {axes} spatial "
            f"axes as the logits have, or [B, {classes}, *full] for soft or multi-label targets"
        )
    # Not `in (1, classes)`: torch.compile with dynamic shapes compares the objects there.
    if has_channels and target.shape[1] != 1 and target.shape[1] != classes:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected 1 channel (class numbers) or {classes} (one value a "
            "class) as the logits have"
        )
    if target.shape[0] != first.shape[0]:
        raise ValueError(f"target: got batch size {target.shape[0]}, expected {first.shape[0]} as the logits have")
    if any(n < 1 for n in target.shape[1:]):
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected at least one pixel along every axis")
    if target.device != first.device:
        raise ValueError(
            f"target: got device {target.device}, expected {first.device} as the logits have; move it with .to()"
        )
    if sigmoid and classes > 1:
        if not has_channels or target.shape[1] == 1:
            raise ValueError(
                f"target: got shape {tuple(target.shape)} with sigmoid=True and {classes} classes, expected one value "
                f"a class, [B, {classes}, *full]; for exclusive classes use softmax (sigmoid=False), or make regions "
                "of the labels, such as torch.stack([y >= 1, y >= 2], 1)"
            )
    elif sigmoid:
        return _without_ignore(target if has_channels else target.unsqueeze(1), ignore_index)
    elif has_channels and target.shape[1] == 1:
        return target.squeeze(1)
    return _without_ignore(target, ignore_index) if has_channels else target


def _without_ignore(target: Tensor, ignore_index: int | None) -> Tensor:
    """Refuse ignore_index for a target [B, C, *full] that cannot hold it."""
    if ignore_index is not None and target.shape[1] > 1:
        raise ValueError(
            f"ignore_index: got {ignore_index} with a target {tuple(target.shape)} of one value a class, which has no "
            "room for such a label, expected None; pass mask= (False where a pixel is to be ignored) instead"
        )
    return target


def check_rule(ignore_index: Any, label_smoothing: Any, weighted_ce: Any, sigmoid: bool) -> TargetRule:
    """Return the rule by which a target is read, or raise naming what is wrong.

    Raises:
        TypeError, ValueError: an option out of range, or label smoothing under sigmoid.
    """
    if ignore_index is not None and type(ignore_index) is not int:
        raise TypeError(f"ignore_index: got {ignore_index!r}, expected None or an int")
    if ignore_index is not None and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {ignore_index}, expected a number that int64 holds, such as 255 or -1")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: got {label_smoothing!r}, expected a number from 0 to 1")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected a number from 0 to 1")
    if not isinstance(weighted_ce, bool):
        raise TypeError(f"weighted_ce: got {weighted_ce!r}, expected True or False")
    if sigmoid and label_smoothing:
        raise ValueError(
            f"label_smoothing: got {label_smoothing!r} with sigmoid=True, expected 0: it spreads labels over exclusive "
            "classes; smooth the target itself, which may be soft"
        )
    return TargetRule(ignore_index, float(label_smoothing), weighted_ce)


def fitting_rule(rule: TargetRule, target: Tensor) -> TargetRule:
    """The rule for labels of this dtype: without an ignored label that they cannot hold, such as -100 in uint8.

    PyTorch compares in the dtype of the tensor, where -100 is 156.

    Raises:
        ValueError: the label is one that a float dtype rounds to another.
    """
    if rule.ignore_index is None:
        return rule
    if target.dtype.is_floating_point:
        odd = abs(rule.ignore_index)
        while odd and odd % 2 == 0:
            odd //= 2
        if odd > _WHOLE[target.dtype] or abs(rule.ignore_index) > torch.finfo(target.dtype).max:
            raise ValueError(
                f"ignore_index: got {rule.ignore_index} with a target of {target.dtype}, expected a number it holds "
                "exactly; take another label or an integer dtype"
            )
        return rule
    limits = (0, 1) if target.dtype == torch.bool else (torch.iinfo(target.dtype).min, torch.iinfo(target.dtype).max)
    return rule if limits[0] <= rule.ignore_index <= limits[1] else replace(rule, ignore_index=None)


def check_weight_map(weight_map: Any, target: Tensor, first: Tensor, name: str = "weight_map") -> Tensor | None:
    """Return weights of pixels as [B, *full], or raise naming what is wrong.

    Args:
        weight_map: None, or float or bool [B, *full] or [B, 1, *full].
        target: already checked.
        first: one of the logits [B, C, *native], already checked.
        name: of the argument, for messages.

    Raises:
        TypeError: not a tensor of such a dtype.
        ValueError: wrong shape or device, or a gradient is asked of it.
    """
    if weight_map is None:
        return None
    weight_map = plain(weight_map)
    if not isinstance(weight_map, Tensor):
        raise TypeError(f"{name}: got {type(weight_map).__name__}, expected a torch.Tensor")
    check_dense(name, weight_map)
    if weight_map.dtype not in (*FLOAT_DTYPES, torch.bool):
        raise TypeError(
            f"{name}: got dtype {weight_map.dtype}, expected a float dtype or bool; convert it with .float() or .bool()"
        )
    if weight_map.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires a gradient, of which there is none; detach it")
    full = target.shape[target.dim() - first.dim() + 2 :]
    expected = (first.shape[0], *full)
    shape = tuple(weight_map.shape)
    has_channel = len(shape) == len(expected) + 1 and shape[1] == 1
    if (not has_channel and shape != expected) or (has_channel and (shape[0], *shape[2:]) != expected):
        raise ValueError(
            f"{name}: got shape {shape}, expected {expected}, one weight a pixel of the target; weights of classes are "
            "ce_weight= and weight="
        )
    if weight_map.device != first.device:
        raise ValueError(f"{name}: got device {weight_map.device}, expected {first.device} as the logits have")
    return weight_map.squeeze(1) if has_channel else weight_map


def check_ce_weight(ce_weight: Any, first: Tensor) -> Tensor | None:
    """Return the class weights of cross-entropy, or raise naming what is wrong.

    Args:
        ce_weight: None or float [C].
        first: one of the logits [B, C, *native], already checked.

    Raises:
        TypeError: not a float tensor.
        ValueError: wrong shape or device, or a gradient is asked of it.
    """
    if ce_weight is None:
        return None
    if not isinstance(ce_weight, Tensor) or ce_weight.dtype not in FLOAT_DTYPES:
        found = getattr(ce_weight, "dtype", type(ce_weight).__name__)
        raise TypeError(f"ce_weight: got {found}, expected a float tensor")
    check_dense("ce_weight", ce_weight)
    if ce_weight.requires_grad:
        raise ValueError("ce_weight: got a tensor that requires a gradient, of which there is none; detach it")
    if tuple(ce_weight.shape) != (first.shape[1],):
        raise ValueError(f"ce_weight: got shape {tuple(ce_weight.shape)}, expected [{first.shape[1]}], one a class")
    if ce_weight.device != first.device:
        raise ValueError(f"ce_weight: got device {ce_weight.device}, expected {first.device} as the logits have")
    return ce_weight


def check_parameters(
    given: dict[str, Tensor | None], plan: MixPlan, first: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (W, b, u, v), or raise naming what is wrong.

    Args:
        given: cat_weight [K, C, C], cat_bias [S, C], awf_weight [K, C], awf_bias [K]: exactly those the plan needs.
        plan: the plan of the call.
        first: one of the logits [B, C, *native], already checked.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: missing, superfluous, or of the wrong shape or device.
    """
    classes = first.shape[1]
    pairs, subsets = plan.num_pairs, plan.num_subsets
    expected = {
        "cat_weight": (plan.uses_cat, (pairs, classes, classes)),
        "cat_bias": (plan.uses_cat, (subsets, classes)),
        "awf_weight": (plan.uses_awf, (pairs, classes)),
        "awf_bias": (plan.uses_awf, (pairs,)),
    }
    for name, (needed, shape) in expected.items():
        value = given[name]
        operator = name[:3]
        if value is None:
            if needed:
                raise ValueError(f"{name}: got None, expected a tensor {list(shape)} because the plan has {operator!r}")
            continue
        if not needed:
            raise ValueError(f"{name}: got a tensor, expected None because the plan makes no {operator!r} map")
        if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: got {getattr(value, 'dtype', type(value).__name__)}, expected a float tensor")
        check_dense(name, value)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
        if value.device != first.device:
            raise ValueError(f"{name}: got device {value.device}, expected {first.device} as the logits have")
    return given["cat_weight"], given["cat_bias"], given["awf_weight"], given["awf_bias"]


def check_order(sizes: Sequence[tuple[int, ...]], order: str, way_out: str | None = None) -> None:
    """Raise if native sizes, listed as the user gave them, contradict `order`.

    Args:
        sizes: spatial shape of each scale in the order of the user's list.
        order: "coarse_to_fine" or "fine_to_coarse".
        way_out: of the message, where `order` is no option.

    Raises:
        ValueError: two neighbours of which one axis shrinks where it should grow, or the other way round.
    """
    coarse_first = list(sizes) if order == "coarse_to_fine" else list(reversed(sizes))
    if _grow(coarse_first):
        return
    other = "fine_to_coarse" if order == "coarse_to_fine" else "coarse_to_fine"
    remedy = f"pass order={other!r} or reverse the list" if _grow(coarse_first[::-1]) else "sort the list by size"
    remedy = remedy if way_out is None else way_out
    raise ValueError(
        f"logits: got native sizes {[tuple(s) for s in sizes]}, which contradict order={order!r}, expected no axis to "
        f"{'shrink' if order == 'coarse_to_fine' else 'grow'} along the list; {remedy}"
    )


def _grow(sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether no axis shrinks from one size to the next."""
    return all(c <= f for coarse, fine in pairwise(sizes) for c, f in zip(coarse, fine, strict=True))


@torch.compiler.assume_constant_result  # so that a compiled call warns while it is traced, which it could not later
def warn_of_order(order: str) -> None:
    """Say which order is assumed of maps whose sizes do not tell."""
    warnings.warn(
        f"logits: got maps of one size, which does not tell their order; assumed is order={order!r}. Say it with "
        "LoMixLoss(..., order='coarse_to_fine') or 'fine_to_coarse', whichever the network has",
        UserWarning,
        stacklevel=stacklevel_outside(),
    )
