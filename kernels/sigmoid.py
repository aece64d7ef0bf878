"""Sigmoids and their cross-entropy, accurate where either is tiny."""

import triton
import triton.language as tl


@triton.jit
def sigmoids(x):
    """exp(-|x|), s = sigmoid(x), and 1 - s, without subtracting."""
    e = tl.exp(-tl.abs(x))
    near, far = 1 / (1 + e), e / (1 + e)
    return e, tl.where(x < 0, far, near), tl.where(x < 0, near, far)


@triton.jit
def _log1p(e, ACC: tl.constexpr):
    """log(1 + e) for e in [0, 1]: 2 artanh(r) with r = e / (2 + e) at most 1/3, as a series.

    log would cancel for small e. What the series leaves out is below 2e-9 of the result, 1e-17 in float64.
    """
    TERMS: tl.constexpr = 17 if tl.float64 == ACC else 8
    r = e / (2 + e)
    square = r * r
    total = tl.zeros_like(e)
    for n in tl.static_range(TERMS):
        total = total * square + 1 / (2 * (TERMS - n) - 1)
    return 2 * r * total


@triton.jit
def binary_cross_entropy(x, e, y, t, ACC: tl.constexpr):
    """-t log s - (1 - y) log(1 - s) with s = sigmoid(x), e = exp(-|x|): no term is negative, so none cancels."""
    return (1 - y + t) * _log1p(e, ACC) + ((1 - y) * tl.maximum(x, 0.0) + t * tl.maximum(-x, 0.0))
