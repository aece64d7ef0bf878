"""Checks of the options of a criterion, made once when it is built: each for itself, and those that contradict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dense, check_rule, has_numbers, plain
from .names import did_you_mean
from .plan import KNOWN_OPERATORS, ONE_SCALE, OPERATORS

SUPERVISION = ("lomix", "mutation", "deep_supervision", "last_layer")
CONCAT = ("learned", "resampled")
ORDER = ("coarse_to_fine", "fine_to_coarse")
MUL = ("logits", "bounded")
ABSENT_CLASSES = ("include", "exclude")

# What numbers are kept in: float64, but with Apple's GPUs, to which none can be moved.
WIDEST = torch.float32 if torch.backends.mps.is_available() else torch.float64


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the names."""
    if value not in tuple(known):
        raise ValueError(f"{name}: got {value!r}, expected one of {tuple(known)}{did_you_mean(value, known)}")


def check_stacked_dim(value: Any) -> None:
    """Raise unless `value` is None or an axis at which scales can be stacked before the classes, 0 or 1.

    Raises:
        TypeError, ValueError: it is not.
    """
    if value is not None and type(value) is not int:
        raise TypeError(f"stacked_dim: got {value!r}, expected None, 0 or 1")
    if value not in (None, 0, 1):
        raise ValueError(
            f"stacked_dim: got {value!r}, expected None, 0 or 1, the axis of the scales in a tensor [B, L, C, *native] "
            "or [L, B, C, *native]; otherwise pass logits.unbind(axis)"
        )


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_number(name: str, value: Any, kinds: type | tuple[type, ...] = (int, float)) -> None:
    """Raise unless `value` is a finite number of at least 0, of one of these kinds.

    Raises:
        TypeError, ValueError: it is not.
    """
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")


def check_classes(num_classes: Any, sigmoid: Any, include_background: Any) -> None:
    """Check the number of classes against what is made of their logits.

    Raises:
        TypeError, ValueError: not an int or flag, or too few classes.
    """
    check_flag("sigmoid", sigmoid)
    check_flag("include_background", include_background)
    least = 1 if sigmoid else 2
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes: got {num_classes!r}, expected an int of at least {least}")
    if num_classes < least:
        reason = (
            ": softmax over one class is constant and teaches nothing; count the background as a class, or pass "
            "sigmoid=True for one class against the rest"
        )
        raise ValueError(f"num_classes: got {num_classes}, expected at least {least}{'' if sigmoid else reason}")
    if num_classes == 1 and not include_background:
        raise ValueError(
            "include_background: got False with num_classes=1, expected True: without class 0 Dice has no class left"
        )


def check_recipe(
    num_classes: int,
    *,
    sigmoid: bool,
    squared_pred: bool,
    lambda_ce: float,
    lambda_dice: float,
    smooth_nr: float,
    smooth_dr: float,
    include_background: bool,
    batch: bool,
    jaccard: bool,
    tversky: tuple[float, float] | None,
    absent_classes: str,
    ce_per_sample: bool,
    structure: bool,
    ignore_index: int | None,
    label_smoothing: float,
    weighted_ce: bool,
) -> None:
    """Check everything that says what the loss of one map is; the arguments are those of `LoMixLoss`.

    Raises:
        TypeError, ValueError: an option out of range, or two that contradict each other, with the way out.
    """
    check_classes(num_classes, sigmoid, include_background)
    for name, value in (
        ("lambda_ce", lambda_ce),
        ("lambda_dice", lambda_dice),
        ("smooth_nr", smooth_nr),
        ("smooth_dr", smooth_dr),
    ):
        check_number(name, value)
    if lambda_ce == 0 and lambda_dice == 0:
        raise ValueError(
            f"lambda_ce and lambda_dice: got {lambda_ce!r} and {lambda_dice!r}, expected one of them above 0; without "
            "either there is no loss"
        )
    for name, flag in (
        ("squared_pred", squared_pred),
        ("batch", batch),
        ("jaccard", jaccard),
        ("ce_per_sample", ce_per_sample),
        ("structure", structure),
    ):
        check_flag(name, flag)
    check_choice("absent_classes", absent_classes, ABSENT_CLASSES)
    check_rule(ignore_index, label_smoothing, weighted_ce, sigmoid)
    if tversky is not None:
        _check_tversky(tversky, squared_pred, jaccard)
    if structure and not sigmoid:
        raise ValueError(
            "structure: got True with sigmoid=False, expected False: the weights are made of one binary mask; pass "
            "sigmoid=True and num_classes=1, or weigh pixels with weight_map="
        )
    if structure and num_classes > 1:
        raise ValueError(
            f"structure: got True with num_classes={num_classes}, expected False: the weights are made of one binary "
            "mask; pass num_classes=1, or weigh pixels with weight_map="
        )


def _check_tversky(tversky: Any, squared_pred: bool, jaccard: bool) -> None:
    if not isinstance(tversky, (tuple, list)) or len(tversky) != 2:
        raise TypeError(f"tversky: got {tversky!r}, expected None or two numbers (alpha, beta)")
    for name, value in zip(("tversky[0]", "tversky[1]"), tversky, strict=True):
        check_number(name, value)
    if not any(tversky):
        raise ValueError(
            f"tversky: got {tversky!r}, expected one of the two above 0; without errors the loss is constant; "
            "lambda_dice=0 leaves Dice out"
        )
    if jaccard:
        raise ValueError(
            f"tversky: got {tversky!r} with jaccard=True, expected None: each replaces Dice; leave one of them out "
            "(tversky=(1, 1) is the Jaccard loss)"
        )
    if squared_pred:
        raise ValueError(
            f"tversky: got {tversky!r} with squared_pred=True, expected None: its false positives and negatives are "
            "sums of s, not of s^2; pass squared_pred=False (in a plan squared=False)"
        )


def class_weights(name: str, value: Any, count: int, reason: str, device: torch.device | None = None) -> Tensor:
    """Weights as a tensor [count] of the caller's own.

    Args:
        name: of the argument, for messages.
        value: sequence, array or tensor of numbers, each finite and at least 0. A float tensor keeps its dtype, numbers
            become float64; whoever uses them casts to the dtype of the sums.
        count: how many there have to be.
        reason: of that number, for the message.
        device: None for weights that are kept: a tensor is copied where it is, and its values are looked at, which
            waits for its device. Otherwise that of one call, in which nothing waits: a tensor must be there, and its
            values are not looked at; numbers are written there by one small kernel each.

    Raises:
        TypeError: not numbers.
        ValueError: another number of them, one that is negative or not finite, or a tensor on another device.
    """
    value = plain(value)
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires a gradient, of which there is none; detach it")
        weights = value.detach()
        if device is not None and weights.device != device:
            raise ValueError(f"{name}: got device {weights.device}, expected {device} as the logits have")
    else:
        weights = _from_numbers(name, value, device)
    if weights.dtype not in FLOAT_DTYPES:
        if weights.dtype.is_complex or weights.dtype == torch.bool:
            raise TypeError(f"{name}: got dtype {weights.dtype}, expected a sequence or tensor of numbers")
        weights = weights.to(WIDEST)
    if tuple(weights.shape) != (count,):
        raise ValueError(f"{name}: got shape {tuple(weights.shape)}, expected [{count}], {reason}")
    if device is not None:
        return weights
    if not has_numbers(weights):
        raise ValueError(
            f"{name}: got a tensor without values, on the meta device or in a FakeTensorMode, expected numbers; pass a "
            "list, as no checkpoint holds class weights"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"{name}: got {weights.tolist()}, expected finite numbers of at least 0")
    return weights.clone()


def _from_numbers(name: str, value: Any, device: torch.device | None) -> Tensor:
    """A sequence or array of numbers as a tensor of one axis."""
    if hasattr(value, "__array__") and hasattr(value, "tolist"):  # of NumPy, which need not be there
        value = value.tolist()
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: got {value!r}, expected a sequence or tensor of numbers")
    for item in value:
        check_number(name, item, Real)
    if device is None or device.type == "cpu" or not value:
        return torch.tensor([float(item) for item in value], dtype=WIDEST, device="cpu" if device is None else device)
    # Not a copy from the host, for which the call would wait and which no CUDA graph may capture.
    return torch.stack([torch.full((), float(item), dtype=WIDEST, device=device) for item in value])


def ce_class_weights(value: Any, num_classes: int, device: torch.device | None = None) -> Tensor | None:
    """The option `ce_weight` as a tensor [C], or None; `device` as for `class_weights`.

    Raises:
        TypeError, ValueError: as `class_weights`.
    """
    return None if value is None else class_weights("ce_weight", value, num_classes, "one weight a class", device)


def is_weighted_mean(target: Any, axes: int, sigmoid: bool) -> bool:
    """Whether cross-entropy is divided by class weights: for class numbers, not for one value for each class.

    Args:
        target: as the user gave it.
        axes: of the logits.
        sigmoid: of the criterion.
    """
    return not sigmoid and isinstance(target, Tensor) and (target.dim() != axes or target.shape[1] == 1)


def without_common_factor(weights: Tensor) -> Tensor:
    """Class weights [C] of softmax cross-entropy times a power of two, float32 or float64, the largest in [1, 2).

    A common factor of theirs cancels; without it their sums neither overflow nor vanish in float32.
    """
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    largest = wide.amax().clamp(min=torch.finfo(wide.dtype).tiny)  # all may be 0
    return wide * torch.exp2(-torch.log2(largest).floor())


def dice_class_weights(
    value: Any, num_classes: int, include_background: bool, device: torch.device | None = None
) -> Tensor | None:
    """The option `weight` as a tensor [C], [C - 1] without background, or a scalar; None without.

    Raises:
        TypeError, ValueError: as `class_weights`, and ValueError for one class.
    """
    if value is None:
        return None
    if num_classes == 1:
        raise ValueError(
            f"weight: got {value!r} with num_classes=1, expected None: there is no other class to weigh it against; "
            "lambda_dice= weighs Dice, ce_weight= the positives of cross-entropy"
        )
    if isinstance(value, Real):
        check_number("weight", value, Real)
        return torch.full((), float(value), dtype=WIDEST, device=device or "cpu")
    if isinstance(plain(value), Tensor) and value.dim() == 0:
        return class_weights("weight", value.reshape(1), 1, "one number", device)[0]
    if include_background:
        return class_weights("weight", value, num_classes, "one weight a class", device)
    reason = f"one weight a class but class 0, which include_background=False leaves out of {num_classes}"
    return class_weights("weight", value, num_classes - 1, reason, device)


def check_mode(
    num_scales: Any,
    supervision: str,
    operators: Any,
    weighting: str,
    mul: str,
    subsets: Any,
    max_subset_size: Any,
) -> tuple[tuple[str, ...], str]:
    """Check the options that say which maps there are against the mode, and fill in what the mode sets itself.

    Returns:
        (operators, weighting) of the criterion.

    Raises:
        TypeError, ValueError: operators that are no list, or an option that the mode sets itself or cannot use.
    """
    if not isinstance(operators, (tuple, list)):
        raise TypeError(f"operators: got {operators!r}, expected a tuple or list out of {KNOWN_OPERATORS}")
    chosen: dict[str, tuple[Any, Any]] = {"subsets": (subsets, None), "max_subset_size": (max_subset_size, None)}
    if supervision == "lomix":
        if mul != "logits" and "mul" not in operators:
            raise ValueError(
                f"mul: got {mul!r} with operators={tuple(operators)}, expected 'logits' because no product is made; "
                "leave it out, or add 'mul' to operators"
            )
        if not operators:
            _refuse(chosen, "operators=()", "makes no mix of several scales; leave it out, or pass operators")
        if num_scales == 1:
            _refuse({"mul": (mul, "logits"), **chosen}, "num_scales=1", ONE_SCALE)
        return tuple(operators), weighting
    passed = {"operators": (tuple(operators), OPERATORS), "weighting": (weighting, "softplus"), "mul": (mul, "logits")}
    if supervision != "mutation":
        passed |= chosen
    _refuse(passed, f"supervision={supervision!r}", "sets it itself; leave it out, or pass supervision='lomix'")
    if num_scales == 1:
        _refuse(chosen, "num_scales=1", ONE_SCALE)
    return (("add",) if supervision == "mutation" else ()), "fixed"


def _refuse(passed: dict[str, tuple[Any, Any]], cause: str, why: str) -> None:
    """Raise for the first option, {name: (given, default)}, that is not at its default."""
    for name, (given, default) in passed.items():
        if given != default:
            raise ValueError(f"{name}: got {given!r} with {cause}, which {why}; expected {default!r}")
