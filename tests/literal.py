"""SPEC.md written out once more, literally: numpy float64, loops over pixels, nothing imported from lomix_fast.

For inputs of a few dozen pixels only. Arrays are z [B, C, *native], y [B, *full]; scales come coarsest first.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np

Array = np.ndarray


def enlarge(z: Array, full: tuple[int, ...]) -> Array:
    """[B, C, *native] -> [B, C, *full], linear along one axis after the other.

    Sample i of N lies at (i + 1/2) n / N - 1/2 of n, held inside [0, n - 1].
    """
    for axis, (n, out) in enumerate(zip(z.shape[2:], full, strict=True), start=2):
        slices = []
        for i in range(out):
            place = min(max((i + 0.5) * n / out - 0.5, 0.0), n - 1.0)
            low = int(place)
            high = min(low + 1, n - 1)
            fraction = place - low
            slices.append((1 - fraction) * z.take(low, axis) + fraction * z.take(high, axis))
        z = np.stack(slices, axis)
    return z


def softmax(values: list[float] | Array) -> Array:
    """Softmax of a short vector."""
    powers = np.exp(np.asarray(values) - np.max(values))
    return powers / powers.sum()


def subsets_of(num_scales: int) -> list[tuple[int, ...]]:
    """Subsets with at least two members, by size, then lexicographic."""
    return [s for size in range(2, num_scales + 1) for s in combinations(range(num_scales), size)]


def mixed_map(
    operator: str,
    members: list[Array],
    weights: list[Array] | None = None,
    bias: Array | None = None,
    scores: list[tuple[Array, float]] | None = None,
) -> Array:
    """One synthetic map from its members [B, C, *full], pixel by pixel.

    Args:
        weights, bias: for cat, one matrix [C, C] per member, and [C].
        scores: for awf, one (u [C], v) per member.
    """
    out = np.zeros_like(members[0])
    batch, _, *full = members[0].shape
    for b, *pixel in product(range(batch), *map(range, full)):
        at = (b, slice(None), *pixel)
        vectors = [p[at] for p in members]  # |S| vectors [C]
        if operator == "add":
            out[at] = sum(vectors)
        elif operator == "mul":
            out[at] = np.prod(vectors, axis=0)
        elif operator == "cat":
            out[at] = bias + sum(w @ p for w, p in zip(weights, vectors, strict=True))
        elif operator == "awf":
            attention = softmax([u @ p + v for (u, v), p in zip(scores, vectors, strict=True)])
            out[at] = sum(a * p for a, p in zip(attention, vectors, strict=True))
        else:
            raise ValueError(operator)
    return out


def base_loss(
    logits: Array,
    y: Array,
    lambda_ce: float = 0.3,
    lambda_dice: float = 0.7,
    smooth: float = 1e-5,
) -> float:
    """l(P, Y) of one map [B, C, *full]: sums over the whole batch, squared denominator, background included."""
    classes = logits.shape[1]
    ce, pixels = 0.0, 0
    inter, squares, count = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    for b, *pixel in product(range(y.shape[0]), *map(range, y.shape[1:])):
        s = softmax(logits[(b, slice(None), *pixel)])
        label = int(y[(b, *pixel)])
        ce -= np.log(s[label])
        pixels += 1
        for c in range(classes):
            hit = 1.0 if label == c else 0.0
            inter[c] += s[c] * hit
            squares[c] += s[c] ** 2
            count[c] += hit
    dice = np.mean([1 - (2 * inter[c] + smooth) / (squares[c] + count[c] + smooth) for c in range(classes)])
    return lambda_ce * ce / pixels + lambda_dice * dice


def last_layer(scales: list[Array], y: Array) -> float:
    """l of the finest map."""
    return base_loss(enlarge(scales[-1], y.shape[1:]), y)


def deep_supervision(scales: list[Array], y: Array) -> float:
    """Sum of l over the scales."""
    return sum(base_loss(enlarge(z, y.shape[1:]), y) for z in scales)


def mutation(scales: list[Array], y: Array) -> float:
    """Sum of l over all 2^L - 1 non-empty subsets of their sum."""
    p = [enlarge(z, y.shape[1:]) for z in scales]
    total = 0.0
    for size in range(1, len(p) + 1):
        for subset in combinations(range(len(p)), size):
            total += base_loss(sum(p[i] for i in subset), y)
    return total


def map_list(
    scales: list[Array],
    full: tuple[int, ...],
    operators: tuple[str, ...],
    cat: dict[tuple[int, ...], tuple[list[Array], Array]] | None = None,
    awf: dict[tuple[int, ...], list[tuple[Array, float]]] | None = None,
) -> list[tuple[str, Array]]:
    """Names and maps in the order of every table: originals, then operator by operator, subset by subset.

    Args:
        cat: subset -> (one matrix [C, C] per member, bias [C]).
        awf: subset -> one (u [C], v) per member.
    """
    p = [enlarge(z, full) for z in scales]
    maps = [(f"orig_{i}", p[i]) for i in range(len(p))]
    for operator in operators:
        for subset in subsets_of(len(p)):
            weights, bias = cat[subset] if operator == "cat" and cat is not None else (None, None)
            scores = awf[subset] if operator == "awf" and awf is not None else None
            name = operator + "".join(f"_{i}" for i in subset)
            maps.append((name, mixed_map(operator, [p[i] for i in subset], weights, bias, scores)))
    return maps


def total(maps: list[tuple[str, Array]], y: Array, alpha: Array | None) -> float:
    """Sum of softplus(alpha_m) * l_m, or of l_m when alpha is None (fixed weights of 1)."""
    weights = np.ones(len(maps)) if alpha is None else np.log1p(np.exp(alpha))
    return sum(w * base_loss(m, y) for w, (_, m) in zip(weights, maps, strict=True))
