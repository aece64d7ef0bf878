"""The whole loss written out once more in torch, with every option, as plainly as possible.

Nothing is imported from lomix_fast. Autograd gives its gradients. In float64 it is the truth that test_fuzz.py compares
with; in float32 it says how large errors of plain PyTorch are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

# What an option is where it is not given, as the paper has it.
DEFAULTS: dict[str, Any] = {
    "supervision": "lomix",
    "operators": ("add", "mul", "cat", "awf"),
    "subsets": None,
    "max_subset_size": None,
    "mul": "logits",
    "awf_sharing": "size",
    "weighting": "softplus",
    "order": "coarse_to_fine",
    "sigmoid": False,
    "lambda_ce": 0.3,
    "lambda_dice": 0.7,
    "smooth_nr": 1e-5,
    "smooth_dr": 1e-5,
    "squared_pred": True,
    "include_background": True,
    "batch": True,
    "jaccard": False,
    "tversky": None,
    "absent_classes": "include",
    "weight": None,
    "ce_weight": None,
    "ce_per_sample": False,
    "weighted_ce": True,
    "ignore_index": None,
    "label_smoothing": 0.0,
    "structure": False,
}


@dataclass
class Pixels:
    """The target, read.

    Attributes:
        y: [B, C, *full], one value for each class.
        in_ce, in_dice: weights of the pixels in either term, [B, *full].
        from_numbers: whether y was made of class numbers.
    """

    y: Tensor
    in_ce: Tensor
    in_dice: Tensor
    from_numbers: bool


def total(
    logits: Sequence[Tensor],
    target: Tensor,
    parameters: Mapping[str, Tensor],
    options: Mapping[str, Any],
    mask: Tensor | None = None,
    weight_map: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar in the dtype of the logits.

    Args:
        logits: L tensors [B, C, *native] in the order that the options say.
        target: class numbers [B, *full], or one value for each class, [B, C, *full].
        parameters: alpha, cat_weight, cat_bias, awf_weight, awf_bias, as far as there are any.
        options: those of LoMixLoss that are not their defaults.
        mask, weight_map: [B, *full].
    """
    o = DEFAULTS | dict(options)
    scales = list(logits) if o["order"] == "coarse_to_fine" else list(reversed(logits))
    full = target.shape[-(scales[0].dim() - 2) :]
    pixels = read(target, scales[0], o, mask, weight_map)
    losses = [loss_of_map(p, pixels, o) for p in maps([enlarge(z, full) for z in scales], parameters, o)]
    found = torch.stack(losses)
    if "alpha" not in parameters:
        return found.sum()
    w = (1 + parameters["alpha"].exp()).log()  # softplus
    if o["weighting"] == "normalized":
        w = w * len(losses) / w.sum()
    result = (w * found).sum()
    if o["weighting"] == "uncertainty" and (pixels.in_ce.sum() > 0 or pixels.in_dice.sum() > 0):
        result = result - w.log().sum()
    return result


def enlarge(z: Tensor, full: Sequence[int]) -> Tensor:
    """[B, C, *native] -> [B, C, *full]: sample i of N lies at (i + 1/2) n / N - 1/2, held inside 0 .. n - 1."""
    for axis, size in enumerate(full, start=2):
        native = z.shape[axis]
        matrix = z.new_zeros(size, native, dtype=torch.float64)
        for i in range(size):
            # In whole numbers: ((2 i + 1) n - N) / (2 N).
            low, rest = divmod(max((2 * i + 1) * native - size, 0), 2 * size)
            if low >= native - 1:
                low, rest = native - 1, 0
            matrix[i, low] += 1 - rest / (2 * size)
            matrix[i, min(low + 1, native - 1)] += rest / (2 * size)
        z = torch.tensordot(z, matrix.to(z.dtype), dims=([axis], [1])).movedim(-1, axis)
    return z


def maps(scales: list[Tensor], parameters: Mapping[str, Tensor], o: Mapping[str, Any]) -> Iterator[Tensor]:
    """The maps [B, C, *full], originals first, then operator by operator, subset by subset."""
    number = len(scales)
    if o["supervision"] == "last_layer":
        yield scales[-1]
        return
    yield from scales
    if o["supervision"] == "deep_supervision":
        return
    operators = ("add",) if o["supervision"] == "mutation" else o["operators"]
    most = 2 if o["subsets"] == "pairs" else o["max_subset_size"] or number
    subsets = [s for size in range(2, most + 1) for s in combinations(range(number), size)]
    if o["subsets"] not in (None, "pairs"):
        subsets = sorted(o["subsets"], key=lambda s: (len(s), s))
    for operator in operators:
        pair = 0
        for place, subset in enumerate(subsets):
            members = [scales[i] for i in subset]
            if operator == "add":
                yield sum(members[1:], start=members[0])
            elif operator == "avg":
                yield sum(members[1:], start=members[0]) / len(members)
            elif operator == "sub":
                yield members[0] - sum(members[2:], start=members[1])
            elif operator == "max":
                yield torch.stack(members).amax(0)  # of scales that are drawn at random no two are equal
            elif operator == "mul":
                if o["mul"] == "bounded":
                    members = [p / (1 + (p / 2) ** 2).sqrt() for p in members]
                yield torch.stack(members).prod(0)
            elif operator == "cat":
                mixed = parameters["cat_bias"][place].reshape(1, -1, *[1] * (scales[0].dim() - 2))
                for k, p in enumerate(members, start=pair):
                    mixed = mixed + torch.tensordot(p, parameters["cat_weight"][k], dims=([1], [1])).movedim(-1, 1)
                yield mixed
            else:
                rows = [row_of(subsets, place, position, pair, o["awf_sharing"]) for position in range(len(subset))]
                u, v = parameters["awf_weight"], parameters["awf_bias"]
                scores = [torch.tensordot(p, u[r], dims=([1], [0])) + v[r] for r, p in zip(rows, members, strict=True)]
                heat = (torch.stack(scores) - torch.stack(scores).amax(0).detach()).exp()
                heat = heat / heat.sum(0)
                yield sum(a.unsqueeze(1) * p for a, p in zip(heat, members, strict=True))
            pair += len(subset)


def row_of(subsets: list[tuple[int, ...]], place: int, position: int, pair: int, sharing: str) -> int:
    """The row of u and v of one member of a subset."""
    if sharing == "subset":
        return pair + position
    if sharing == "scale":
        return subsets[place][position]
    return sum(size for size in {len(s) for s in subsets} if size < len(subsets[place])) + position


def read(target: Tensor, first: Tensor, o: Mapping[str, Any], mask: Tensor | None, weight_map: Tensor | None) -> Pixels:
    """What every pixel asks for, and how much it counts."""
    dtype, classes = first.dtype, first.shape[1]
    from_numbers = target.dim() < first.dim()
    labels = target.to(torch.float64)
    is_counted = torch.ones_like(labels if from_numbers else labels[:, 0], dtype=torch.bool)
    ignored = torch.zeros_like(labels, dtype=torch.bool) if o["ignore_index"] is None else labels == o["ignore_index"]
    is_counted = is_counted & ~(ignored if from_numbers else ignored[:, 0])
    if mask is not None:
        is_counted = is_counted & (mask != 0)
    labels = labels.masked_fill(ignored, 0)
    if not from_numbers:
        y = labels
    elif o["sigmoid"]:
        y = labels.unsqueeze(1)  # one class
    else:
        y = torch.stack([labels == c for c in range(classes)], dim=1)
    ones = is_counted.to(dtype)
    in_dice = ones if weight_map is None else ones * weight_map.to(dtype)
    if o["structure"]:
        edges = target.to(torch.float64) if from_numbers else target[:, 0].to(torch.float64)
        edges = edges.masked_fill(ignored if from_numbers else ignored[:, 0], 0)
        in_dice = in_dice * (1 + 5 * (mean_of_surroundings(edges) - edges).abs()).to(dtype)
    # Regions of one class have no class numbers: what cross-entropy is divided by is not weighed by class.
    return Pixels(y.to(dtype), in_dice if o["weighted_ce"] else ones, in_dice, from_numbers and not o["sigmoid"])


def mean_of_surroundings(values: Tensor) -> Tensor:
    """The mean over 31 pixels along each axis, zeros beyond the border: [B, *full] -> the same."""
    for axis in range(1, values.dim()):
        size = values.shape[axis]
        near = [[1 / 31 if abs(i - j) <= 15 else 0.0 for j in range(size)] for i in range(size)]
        matrix = torch.tensor(near, dtype=values.dtype)
        values = torch.tensordot(values, matrix, dims=([axis], [1])).movedim(-1, axis)
    return values


def loss_of_map(p: Tensor, pixels: Pixels, o: Mapping[str, Any]) -> Tensor:
    """lambda_ce CE + lambda_dice Dice of one map [B, C, *full]."""
    return o["lambda_ce"] * cross_entropy(p, pixels, o) + o["lambda_dice"] * dice(p, pixels, o)


def cross_entropy(p: Tensor, pixels: Pixels, o: Mapping[str, Any]) -> Tensor:
    """The mean over the pixels that count, as torch.nn.CrossEntropyLoss and BCEWithLogitsLoss have it."""
    classes = p.shape[1]
    factor = p.new_ones(classes) if o["ce_weight"] is None else torch.tensor(o["ce_weight"], dtype=p.dtype)
    factor = factor.reshape(1, -1, *[1] * (p.dim() - 2))
    y, weight = pixels.y, pixels.in_ce
    if o["sigmoid"]:
        each = factor * y * torch.logaddexp(-p, 0 * p) + (1 - y) * torch.logaddexp(p, 0 * p)
        counts = weight * classes
    else:
        shares = y * (1 - o["label_smoothing"]) + o["label_smoothing"] / classes
        shifted = p - p.amax(1, keepdim=True).detach()
        each = -factor * shares * (shifted - shifted.exp().sum(1, keepdim=True).log())
        counts = weight * (factor * y).sum(1) if pixels.from_numbers else weight
    sums, counts = (each.sum(1) * weight).flatten(1).sum(1), counts.flatten(1).sum(1)  # [B]
    if not o["ce_per_sample"]:
        sums, counts = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
    return torch.stack([s / c if c > 0 else 0 * s for s, c in zip(sums, counts, strict=True)]).mean()


def dice(p: Tensor, pixels: Pixels, o: Mapping[str, Any]) -> Tensor:
    """The mean over classes, and over samples unless `batch`, of 1 minus the ratio that the options say."""
    if o["sigmoid"]:
        s = (-torch.logaddexp(-p, 0 * p)).exp()
    else:
        heat = (p - p.amax(1, keepdim=True).detach()).exp()
        s = heat / heat.sum(1, keepdim=True)
    y, w = pixels.y, pixels.in_dice.unsqueeze(1)
    power = 2 if o["squared_pred"] else 1
    sums = [(w * x).flatten(2).sum(2) for x in (s * y, s**power, y**power)]  # [B, C] each
    if o["batch"]:
        sums = [x.sum(0, keepdim=True) for x in sums]
    first = 0 if o["include_background"] else 1
    classes = list(range(first, p.shape[1]))
    factors = o["weight"] if isinstance(o["weight"], (list, tuple)) else [o["weight"] or 1.0] * len(classes)
    samples = []
    for inter, squares, labels in zip(*sums, strict=True):  # [C] each
        terms = []
        for c, factor in zip(classes, factors, strict=True):
            i, q, g = inter[c], squares[c], labels[c]
            if o["absent_classes"] == "exclude" and not g > 0:
                continue
            if o["tversky"] is not None:
                a, b = o["tversky"]
                ratio = (i + o["smooth_nr"]) / (i + a * (q - i) + b * (g - i) + o["smooth_dr"])
            elif o["jaccard"]:
                ratio = (2 * i + o["smooth_nr"]) / (2 * (q + g - i) + o["smooth_dr"])
            else:
                ratio = (2 * i + o["smooth_nr"]) / (q + g + o["smooth_dr"])
            terms.append(factor * (1 - ratio))
        counts_any = bool(squares.sum() + labels.sum() != 0)
        samples.append(sum(terms) / len(terms) if terms and counts_any else 0 * inter.sum())
    return torch.stack(samples).mean()
