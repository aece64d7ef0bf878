"""The least time that a step of the loss can take on a card: operations that cannot be avoided, over rates of the card.

Operations are counted for each pixel and are those of float32 arithmetic after the best reordering we know of. They
are FP32 operations (a multiply-add is one), operations of the special function units (exponentials, logarithms,
reciprocals) and bytes that must cross the memory's pins once. Everything else, addresses, loops, loads from shared
memory, waiting, is counted as free and perfectly overlapped: no kernel gets there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..gpu.cards import Card

# A softmax over the classes of one map, with sums of it: scaling or shifting, sum, square, product with what a pixel
# adds to the intersection. Backward: the value again, its sums, and the gradient of it.
_SOFTMAX, _SOFTMAX_BACK = 4, 5
_LOGS_TOGETHER = 8  # logarithms of so many sums are taken as one, of their product
_PASSES = 3  # half-precision products that make one of float32, from a high and a low half of both factors
_TILE = 16  # rows and columns that the matrix units round up to
_MMA_MACS = 16 * 8 * 16  # multiply-adds of one half-precision matrix instruction
_WARP = 32
OPERATORS = ("originals", "add", "mul", "awf", "cat", "maps", "interpolation")


@dataclass(frozen=True)
class Rates:
    """What a card does a second.

    Attributes:
        fp32: multiply-adds.
        special: exponentials.
        issue: instructions of a thread, of all kinds together.
        tensor: multiply-adds of half-precision matrix products with float32 sums, 0 without matrix units.
        memory: bytes copied, read and written ones together.
        measured: whether all of that was measured on the card; otherwise it is a model.
    """

    fp32: float
    special: float
    issue: float
    tensor: float
    memory: float
    measured: bool = True

    @classmethod
    def of_measures(cls, found: Mapping[str, Any]) -> Rates:
        """From the object that rates.cu prints.

        Raises:
            ValueError: a measure that a floor needs is missing or not a positive number.
        """
        measures = found.get("measures", ())
        values = {m["name"]: m["value"] for m in measures if isinstance(m, dict) and {"name", "value"} <= m.keys()}
        for name in ("ffma", "ex2", "issue", "copy"):
            value = values.get(name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"measures: got {value!r} for {name}, expected a positive number")
        return cls(values["ffma"], values["ex2"], values["issue"], values.get("mma_half", 0.0), values["copy"])

    @classmethod
    def of_data_sheet(cls, card: Card) -> Rates:
        """From what the vendor says of a card that nobody has measured: a model."""
        clocks = card.cores * card.clock
        # tf32 counts two operations for a multiply-add, and half precision does twice as many.
        return cls(
            clocks * card.lanes, clocks * card.special, clocks * 4 * _WARP, card.tf32, card.memory_rate, measured=False
        )


@dataclass(frozen=True)
class Work:
    """Operations of one pass that cannot be avoided, for each pixel.

    Attributes:
        fp32: by the names of `OPERATORS`, without the matrix products of "cat".
        special: likewise.
        products: multiply-adds of those matrix products.
        matrix: multiply-adds of the matrix units that do these instead, padding and all passes counted.
    """

    fp32: dict[str, int]
    special: dict[str, int]
    products: int
    matrix: int


@dataclass(frozen=True)
class Floor:
    """The least time of a step.

    Attributes:
        forward_ms, backward_ms: milliseconds.
        binding: what decides, forward and backward: "fp32", "special", "issue", "tensor" or "memory"; one word where it
            is the same.
        measured: whether the rates were; otherwise this is a model.
    """

    forward_ms: float
    backward_ms: float
    binding: str
    measured: bool

    @property
    def step_ms(self) -> float:
        """Forward and backward, milliseconds."""
        return self.forward_ms + self.backward_ms


def default_ratios(scales: int, dims: int) -> tuple[int, ...]:
    """Full size over native size of each scale, coarsest first: down to 1/4 in 2D, down to full size in 3D."""
    last = 2 if dims == 2 else 0
    return tuple(2 ** (last + i) for i in reversed(range(scales)))


def _score_cost(classes: int, ratio: int, dims: int) -> int:
    """FP32 operations of one attention score at a pixel.

    A score is linear in the logits, so those of a coarse scale can be computed natively and interpolated.
    """
    return min(classes, dims + 1) if ratio != 1 else classes


def work(classes: int, ratios: Sequence[int], dims: int) -> tuple[Work, Work]:
    """Operations a pixel of the forward and of the backward pass, all four operators.

    Args:
        classes: C.
        ratios: full size over native size of each scale, coarsest first.
        dims: spatial axes.
    """
    scales = len(ratios)
    sizes = range(2, scales + 1)
    subsets = sum(math.comb(scales, size) for size in sizes)
    pairs = sum(size * math.comb(scales, size) for size in sizes)
    maps = scales + 4 * subsets
    own, mixed, members = scales * classes, subsets * classes, pairs * classes
    resized = sum(ratio != 1 for ratio in ratios)
    # Weights of the attention are shared by subsets of a size, by place in the subset: a scale has one score for each
    # size and each place that it can have. Before it there must be as many scales as places, and enough after it.
    scores = [
        ratio
        for size in sizes
        for place in range(size)
        for scale, ratio in enumerate(ratios)
        if scale >= place and scales - 1 - scale >= size - 1 - place
    ]
    coarse = sum(ratio != 1 for ratio in scores)
    made = sum(_score_cost(classes, ratio, dims) for ratio in scores)
    # An exponential a score, then the weights of each subset: their sum and one multiplication for each member.
    attention = made + len(scores) + pairs + (pairs - subsets)
    lerps = resized * classes * (dims + 1)  # one axis is shared with the neighbouring pixel
    forward = {
        "originals": _SOFTMAX * own,
        "add": _SOFTMAX * mixed,  # exponentials of sums are products of exponentials, one multiplication a subset
        "mul": (2 + _SOFTMAX) * mixed,  # the product and the maximum besides
        "awf": attention + members + _SOFTMAX * mixed,
        "cat": (1 + _SOFTMAX) * mixed,  # the bias besides
        "maps": 2 * maps,
        "interpolation": lerps,
    }
    back = {
        "originals": (1 + _SOFTMAX_BACK) * own,
        # To the members: one by one, or from each subset to the one it was made of and to the scale that was added.
        "add": _SOFTMAX_BACK * mixed + min(members, 2 * mixed + own),
        "mul": (3 + _SOFTMAX_BACK + 2) * mixed,
        # Forward again; the gradient times each weight, the weights' gradients (a dot product a member, then the
        # softmax over members), and those of the scores, which go back natively where a scale is coarse.
        "awf": attention
        + members
        + (1 + _SOFTMAX_BACK) * mixed
        + 2 * members
        + 4 * pairs
        + 3 * len(scores)
        + 2 * coarse
        + 2 * (len(scores) - coarse) * classes,
        "cat": (3 + _SOFTMAX_BACK) * mixed,
        "maps": 6 * maps,
        "interpolation": lerps + int(1.2 * lerps),  # and the adjoint, where one pixel in five is seen twice
    }
    special = {
        "originals": own,
        "add": 0,
        "mul": mixed + subsets,  # the label's term besides
        "awf": len(scores) + subsets + mixed,  # the sum of weights is inverted
        "cat": mixed,
        "interpolation": 0,
    }
    products = pairs * classes * classes
    padded = -(-classes // _TILE) * _TILE
    inner = sum(math.comb(scales, size) * -(-size * classes // _TILE) * _TILE for size in sizes)
    matrix = _PASSES * padded * inner
    # Three products in the backward pass: the map again, the gradient of the logits, that of the weights.
    return (
        Work(forward, {**special, "maps": maps + maps // _LOGS_TOGETHER}, products, matrix),
        Work(back, {**special, "maps": maps}, 3 * products, 3 * matrix),
    )


def _slowest(one: Work, rates: Rates) -> tuple[float, str]:
    """Seconds of a pixel and what decides, with the better of multiply-adds and matrix units for the products."""
    fp32, special = sum(one.fp32.values()), sum(one.special.values())

    def bound(fp32: float, other: float, matrix: float) -> tuple[float, str]:
        issued = fp32 + special + other
        found = {"fp32": fp32 / rates.fp32, "issue": issued / rates.issue, "special": special / rates.special}
        if matrix:
            found["tensor"] = matrix / rates.tensor
        name = max(found, key=lambda key: found[key])
        return found[name], name

    direct = bound(fp32 + one.products, 0, 0)
    if not rates.tensor:
        return direct
    return min(direct, bound(fp32, _WARP * one.matrix / _MMA_MACS, one.matrix))


def floor(
    classes: int,
    scales: int,
    dims: int,
    pixels: int,
    rates: Rates,
    *,
    ratios: Sequence[int] | None = None,
    itemsize: int = 4,
    label_bytes: int = 8,
) -> Floor:
    """The least time of one step.

    Args:
        classes, scales, dims: C, L, and spatial axes.
        pixels: of the whole batch, at full size.
        rates: of the card.
        ratios: full size over native size of each scale, see `default_ratios`.
        itemsize, label_bytes: bytes of a logit and of a label.

    Raises:
        ValueError: ratios for another number of scales.
    """
    ratios = default_ratios(scales, dims) if ratios is None else tuple(ratios)
    if len(ratios) != scales:
        raise ValueError(f"ratios: got {len(ratios)} for {scales} scales, expected one for each")
    logits = itemsize * classes * sum(ratio ** -float(dims) for ratio in ratios)
    found = []
    for one, moved in zip(work(classes, ratios, dims), (logits, 2 * logits), strict=True):  # backward writes gradients
        memory = (moved + label_bytes) / rates.memory
        found.append(max(_slowest(one, rates), (memory, "memory")))
    (forward, first), (backward, second) = found
    binding = first if first == second else f"forward {first}, backward {second}"
    return Floor(1e3 * pixels * forward, 1e3 * pixels * backward, binding, rates.measured)
