"""What `lomix_fast.official` accepts, checked before any work starts; the rest is refused, never ignored."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .names import did_you_mean
from .official_names import OUR_NAME
from .plan import MAX_SCALES

_DEFAULT_OPERATIONS = ("add", "sub", "mul", "concat", "weighted_fusion", "avg", "max")


def check_counts(original_num_maps: Any, num_classes: Any, selecetd_num_maps: Any) -> None:
    """Raise unless the three numbers of the constructor make sense together.

    Raises:
        TypeError: not an int.
        ValueError: out of range; the message says what the range is and why.
    """
    given = {
        "original_num_maps": original_num_maps,
        "num_classes": num_classes,
        "selecetd_num_maps": selecetd_num_maps,
    }
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an int")
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}, expected at least 2; count the background as a class")
    if not 2 <= selecetd_num_maps <= MAX_SCALES:
        subsets = max(2**selecetd_num_maps - 1 - selecetd_num_maps, 0) if selecetd_num_maps >= 0 else 0
        raise ValueError(
            f"selecetd_num_maps: got {selecetd_num_maps}, expected 2 to {MAX_SCALES}; it would mean "
            f"{subsets} mixed maps per operation"
        )
    if not selecetd_num_maps <= original_num_maps <= MAX_SCALES:
        raise ValueError(
            f"original_num_maps: got {original_num_maps}, expected {selecetd_num_maps} (selecetd_num_maps) "
            f"to {MAX_SCALES}; the maps that are mixed are the first of the original ones"
        )


def check_operations(operations: Any) -> list[str]:
    """Return the operations as a list, the authors' seven for None, or raise naming the one that cannot be had.

    Raises:
        TypeError: not a list or tuple of strings.
        ValueError: an unknown name, or an operation named twice.
    """
    supported = f"expected names out of {', '.join(map(repr, OUR_NAME))} ('wf' is short for 'weighted_fusion')"
    if operations is None:
        return list(_DEFAULT_OPERATIONS)
    if isinstance(operations, str) or not isinstance(operations, (list, tuple)):
        raise TypeError(f"operations: got {operations!r}, expected a list of names; {supported}")
    for name in operations:
        if name not in OUR_NAME:
            raise ValueError(f"operations: got the unknown name {name!r}; {supported}{did_you_mean(name, OUR_NAME)}")
    if len({OUR_NAME[name] for name in operations}) != len(operations):
        raise ValueError(f"operations: got {list(operations)}, expected each operation once; {supported}")
    return list(operations)


def check_labels(label_batch: Any, first: Tensor) -> None:
    """Refuse one value a class, which `map_stats` would take and the authors' module does not."""
    if isinstance(label_batch, Tensor) and label_batch.dim() == first.dim() and label_batch.shape[1] != 1:
        raise ValueError(
            f"label_batch: got shape {tuple(label_batch.shape)}, expected class numbers [B, *full] or [B, 1, *full]; "
            "one-hot labels must be turned into them with argmax(1), LoMixLoss takes soft ones"
        )


def check_factor(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite and at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")


def check_ce(ce_loss: Any) -> None:
    """Raise unless `ce_loss` is torch.nn.CrossEntropyLoss as constructed by default.

    Raises:
        TypeError: another object, a subclass included: what it computes cannot be known.
        ValueError: an option that the fused loss does not honour.
    """
    way_out = "pass nn.CrossEntropyLoss(), or keep the authors' module for this loss"
    if type(ce_loss) is not nn.CrossEntropyLoss:
        raise TypeError(f"ce_loss: got {type(ce_loss).__name__}, expected a plain torch.nn.CrossEntropyLoss; {way_out}")
    if ce_loss.weight is not None:
        raise ValueError(f"ce_loss: got weight={ce_loss.weight.tolist()}, expected None; {way_out}")
    for name, wanted in (("ignore_index", -100), ("label_smoothing", 0.0), ("reduction", "mean")):
        if getattr(ce_loss, name) != wanted:
            raise ValueError(f"ce_loss: got {name}={getattr(ce_loss, name)!r}, expected {wanted!r}; {way_out}")


def check_dice(dice_loss: Any, num_classes: int) -> None:
    """Raise unless `dice_loss` is the authors' DiceLoss(num_classes), known by class name and `n_classes`.

    Raises:
        TypeError: another object.
        ValueError: it was made for another number of classes.
    """
    way_out = f"pass the authors' DiceLoss({num_classes}), or keep the authors' module for this loss"
    if type(dice_loss).__name__ != "DiceLoss" or not hasattr(dice_loss, "n_classes"):
        kind = type(dice_loss)
        raise TypeError(
            f"dice_loss: got {kind.__module__}.{kind.__name__}, expected the authors' DiceLoss, a class of "
            f"that name with an attribute n_classes; {way_out}"
        )
    if dice_loss.n_classes != num_classes:
        raise ValueError(
            f"dice_loss: got n_classes={dice_loss.n_classes!r}, expected num_classes={num_classes}; {way_out}"
        )
