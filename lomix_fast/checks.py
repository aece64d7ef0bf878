"""Checks of everything a user passes, made before any work starts. No data is read here, so nothing waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .plan import MixPlan

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain(tensor: Any) -> Any:
    """Unwrap a MONAI MetaTensor; everything else is returned as it is."""
    return tensor.as_tensor() if type(tensor).__name__ == "MetaTensor" else tensor


def check_logits(logits: Any) -> list[Tensor]:
    """Return the logits as a list of plain tensors, or raise naming what is wrong.

    Args:
        logits: list or tuple of L tensors [B, C, *native] with 1 to 3 spatial axes; the same B, C, dtype, device.

    Raises:
        TypeError: not a list or tuple of floating-point tensors.
        ValueError: empty, or tensors that do not fit together.
    """
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"logits: got {type(logits).__name__}, expected a list or tuple of [B, C, *native] tensors")
    if not logits:
        raise ValueError("logits: got an empty list, expected at least one [B, C, *native] tensor")
    maps = [plain(z) for z in logits]
    for i, z in enumerate(maps):
        if not isinstance(z, Tensor):
            raise TypeError(f"logits[{i}]: got {type(z).__name__}, expected a torch.Tensor")
        if z.dtype not in FLOAT_DTYPES:
            raise TypeError(f"logits[{i}]: got dtype {z.dtype}, expected one of {FLOAT_DTYPES}")
        if z.layout != torch.strided:
            raise TypeError(f"logits[{i}]: got layout {z.layout}, expected a dense tensor; call .to_dense() first")
        if not 3 <= z.dim() <= 5:
            raise ValueError(
                f"logits[{i}]: got shape {tuple(z.shape)}, expected [B, C, *native] with 1, 2 or 3 spatial axes"
            )
        if z.shape[1] < 1 or any(n < 1 for n in z.shape[2:]):
            raise ValueError(f"logits[{i}]: got shape {tuple(z.shape)}, expected at least one class and one pixel")
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
                raise ValueError(f"logits[{i}]: got {what} {got}, expected {want} as logits[0] has")
    return maps


def check_target(target: Any, first: Tensor) -> Tensor:
    """Return the labels as [B, *full], or raise naming what is wrong.

    Args:
        target: [B, *full] or [B, 1, *full]; any integer dtype, bool, or floats that hold whole numbers (their values
            are looked at by the op itself, on the device).
        first: one of the logits [B, C, *native], already checked.

    Raises:
        TypeError: not a tensor of such a dtype.
        ValueError: wrong rank, batch size or device, or no pixel.
    """
    target = plain(target)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a torch.Tensor of labels")
    if target.dtype.is_complex or target.is_quantized:
        raise TypeError(f"target: got dtype {target.dtype}, expected an integer, bool or whole-number float dtype")
    axes = first.dim() - 2
    if target.dim() == axes + 2 and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.dim() != axes + 1:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected [B, *full] or [B, 1, *full] with {axes} spatial "
            f"axes as the logits have; one-hot labels must be turned into class numbers with argmax(1)"
        )
    if target.shape[0] != first.shape[0]:
        raise ValueError(f"target: got batch size {target.shape[0]}, expected {first.shape[0]} as the logits have")
    if any(n < 1 for n in target.shape[1:]):
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected at least one pixel along every axis")
    if target.device != first.device:
        raise ValueError(f"target: got device {target.device}, expected {first.device} as the logits have")
    return target


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
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
        if value.device != first.device:
            raise ValueError(f"{name}: got device {value.device}, expected {first.device} as the logits have")
    return given["cat_weight"], given["cat_bias"], given["awf_weight"], given["awf_bias"]


def check_order(sizes: Sequence[tuple[int, ...]], order: str) -> None:
    """Raise if native sizes, listed as the user gave them, contradict `order`.

    Args:
        sizes: spatial shape of each scale in the order of the user's list.
        order: "coarse_to_fine" or "fine_to_coarse".

    Raises:
        ValueError: two neighbours of which one axis shrinks where it should grow, or the other way round.
    """
    coarse_first = list(sizes) if order == "coarse_to_fine" else list(reversed(sizes))
    if _grow(coarse_first):
        return
    other = "fine_to_coarse" if order == "coarse_to_fine" else "coarse_to_fine"
    remedy = f"pass order={other!r} or reverse the list" if _grow(coarse_first[::-1]) else "sort the list by size"
    raise ValueError(
        f"logits: got native sizes {[tuple(s) for s in sizes]}, which contradict order={order!r}, expected no axis to "
        f"{'shrink' if order == 'coarse_to_fine' else 'grow'} along the list; {remedy}"
    )


def _grow(sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether no axis shrinks from one size to the next."""
    return all(c <= f for coarse, fine in pairwise(sizes) for c, f in zip(coarse, fine, strict=True))
