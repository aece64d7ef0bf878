"""The gradient of one map under general targets: weights, several classes at once, smoothed labels, sigmoids.

With y_c the target of a pixel, t_c its share in cross-entropy, wd and wc its weights, and pull_c = gI_c y_c + q gQ_c
s_c^(q - 1), the gradient is g_ce wc (T s_c - t_c) + wd s_c (pull_c - sum_k s_k pull_k) with T = sum_k t_k, or for
sigmoids g_ce wc ((1 - y_c) s_c - t_c (1 - s_c)) + wd s_c (1 - s_c) pull_c.
"""

import triton
import triton.language as tl

from .maps import below, exponentials, join_tile, largest, load_classes, make_map, scaled, store_classes
from .sigmoid import sigmoids
from .targets import target_of


@triton.jit
def _pull(p_grad, s, y, c, C, MANY: tl.constexpr, SQUARED: tl.constexpr):
    """pull_c of one class; p_grad: dLoss/dstats [1 + 2C] of this map."""
    here = below(True, c, C, MANY)
    g_i = tl.load(p_grad + 1 + c, mask=here, other=0.0)
    g_q = tl.load(p_grad + 1 + C + c, mask=here, other=0.0)
    return g_i * y + (2 * g_q * s if SQUARED else g_q)


@triton.jit
def _means(
    p_grad, s, p_target, p_factors, label, c0, C, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    SQUARED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Sums over classes of s_c pull_c and of t_c."""
    mean = tl.zeros_like(label)
    share = tl.zeros_like(label)
    for c in tl.static_range(CT):
        y, t = target_of(p_target, p_factors, label, c0 + c, C, T, DENSE, MANY)
        mean += s[c] * _pull(p_grad, s[c], y, c0 + c, C, MANY, SQUARED)
        share += t
    return mean, share


@triton.jit
def _softmax_gradient(
    p_grad, s, mean, share, p_target, p_factors, label, c0, C, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    SQUARED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """dLoss/dmap of each class under softmax."""
    dice = tl.load(p_target + T)
    entropy = tl.load(p_grad) * tl.load(p_target + 2 * T)
    out = ()
    for c in tl.static_range(CT):
        y, t = target_of(p_target, p_factors, label, c0 + c, C, T, DENSE, MANY)
        pull = _pull(p_grad, s[c], y, c0 + c, C, MANY, SQUARED) - mean
        out = out + (entropy * (share * s[c] - t) + dice * (s[c] * pull),)
    return out


@triton.jit
def _sigmoid_gradient(
    p_grad, x, p_target, p_factors, label, c0, C, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    SQUARED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """dLoss/dmap of each class under sigmoids; one class does not depend on another."""
    dice = tl.load(p_target + T)
    entropy = tl.load(p_grad) * tl.load(p_target + 2 * T)
    out = ()
    for c in tl.static_range(CT):
        y, t = target_of(p_target, p_factors, label, c0 + c, C, T, DENSE, MANY)
        _, s, rest = sigmoids(x[c])
        pull = _pull(p_grad, s, y, c0 + c, C, MANY, SQUARED)
        out = out + (entropy * ((1 - y) * s - t * rest) + dice * (s * rest * pull),)
    return out


@triton.jit
def _product(gradient, x, c0, C, CT: tl.constexpr, MANY: tl.constexpr):
    """Sum over the classes below C of gradient * x."""
    out = tl.zeros_like(x[0])
    for c in tl.static_range(CT):
        out += tl.where(c0 + c < C, gradient[c] * x[c], 0.0) if MANY else gradient[c] * x[c]
    return out


@triton.jit
def general_gradient(
    operator, p_rows, p_attention, p_out, p_target, p_factors, label, p_grad, p_w, p_bias, p_entry, size, first_pair,
    width, C, px, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr, SQUARED: tl.constexpr, SIGMOID: tl.constexpr,
    DENSE: tl.constexpr, EXTRA: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dLoss/dmap of one map into rows [C, T] at p_out; returns its sum over classes with the map itself [1, T].

    p_target: the rows of the target, see targets.py, at the pixels; p_factors: a and b, [2, C].
    """
    along = tl.zeros_like(label)
    if SIGMOID:
        for c0 in range(0, C if MANY else 1, CT):
            first = c0 if MANY else 0
            x = make_map(
                operator, p_rows, p_attention, p_out, p_w, p_bias, p_entry, size, first_pair, width, first, C, px, T,
                CT, MANY, EXTRA, BOUNDED, ACC,
            )  # fmt: skip
            gradient = _sigmoid_gradient(
                p_grad, x, p_target, p_factors, label, first, C, T, CT, MANY, SQUARED, DENSE
            )  # fmt: skip
            along += _product(gradient, x, first, C, CT, MANY)
            store_classes(p_out, gradient, first, C, px >= 0, T, CT, MANY)
    elif MANY:
        top = tl.zeros_like(label) - float("inf")
        total = tl.zeros_like(label)
        for c0 in range(0, C, CT):
            x = make_map(
                operator, p_rows, p_attention, p_out, p_w, p_bias, p_entry, size, first_pair, width, c0, C, px, T, CT,
                True, EXTRA, BOUNDED, ACC,
            )  # fmt: skip
            store_classes(p_out, x, c0, C, px >= 0, T, CT, True)
            top, total = join_tile(x, top, total, CT)
        inverse = 1 / total
        tl.debug_barrier()
        mean = tl.zeros_like(label)
        share = tl.zeros_like(label)
        for c0 in range(0, C, CT):
            e, _ = exponentials(load_classes(p_out, c0, C, px >= 0, -float("inf"), T, CT, True), top, CT)
            s = scaled(e, inverse, CT)
            added, more = _means(p_grad, s, p_target, p_factors, label, c0, C, T, CT, True, SQUARED, DENSE)
            mean += added
            share += more
        for c0 in range(0, C, CT):
            x = load_classes(p_out, c0, C, px >= 0, -float("inf"), T, CT, True)
            e, _ = exponentials(x, top, CT)
            s = scaled(e, inverse, CT)
            gradient = _softmax_gradient(
                p_grad, s, mean, share, p_target, p_factors, label, c0, C, T, CT, True, SQUARED, DENSE
            )  # fmt: skip
            along += _product(gradient, x, c0, C, CT, True)
            store_classes(p_out, gradient, c0, C, px >= 0, T, CT, True)
    else:
        x = make_map(
            operator, p_rows, p_attention, p_out, p_w, p_bias, p_entry, size, first_pair, width, 0, C, px, T, CT, False,
            EXTRA, BOUNDED, ACC,
        )  # fmt: skip
        e, total = exponentials(x, largest(x, CT), CT)
        s = scaled(e, 1 / total, CT)
        mean, share = _means(p_grad, s, p_target, p_factors, label, 0, C, T, CT, False, SQUARED, DENSE)
        gradient = _softmax_gradient(
            p_grad, s, mean, share, p_target, p_factors, label, 0, C, T, CT, False, SQUARED, DENSE
        )  # fmt: skip
        along = _product(gradient, x, 0, C, CT, False)
        store_classes(p_out, gradient, 0, C, px >= 0, T, CT, False)
    return along
