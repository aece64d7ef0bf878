"""The gradient of one map with respect to its values, from those of its statistics, for targets of class numbers.

general_gradient.py has the same for targets with weights, several classes at once, and sigmoids.
"""

import triton
import triton.language as tl

from .general_gradient import general_gradient
from .maps import (
    below,
    exponentials,
    join_tile,
    largest,
    load_classes,
    make_map,
    scaled,
    store_classes,
)


@triton.jit
def _pulls(p_grad, s, label, c0, C, SQUARED: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr):
    """t_c = gI_c [y == c] + q gQ_c s_c^(q - 1) of each class; p_grad: dLoss/dstats [1 + 2C] of this map."""
    out = ()
    for c in tl.static_range(CT):
        here = below(True, c0 + c, C, MANY)
        g_i = tl.load(p_grad + 1 + c0 + c, mask=here, other=0.0)
        g_q = tl.load(p_grad + 1 + C + c0 + c, mask=here, other=0.0)
        out = out + (tl.where(label == c0 + c, g_i, 0.0) + (2 * g_q * s[c] if SQUARED else g_q),)
    return out


@triton.jit
def _dot(a, b, CT: tl.constexpr):
    """Sum over the classes of a * b."""
    out = a[0] * b[0]
    for c in tl.static_range(1, CT):
        out += a[c] * b[c]
    return out


@triton.jit
def _gradient(s, pulls, mean, g_ce, label, c0, CT: tl.constexpr):
    """dLoss/dmap of each class: s_c (t_c - sum_k s_k t_k + g_ce) - [y == c] g_ce."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (s[c] * (pulls[c] - mean + g_ce) - tl.where(label == c0 + c, g_ce, 0.0),)
    return out


@triton.jit
def map_gradient(
    operator, p_rows, p_attention, p_out, p_target, p_factors, label, p_grad, p_w, p_bias, p_entry, size, first_pair,
    width, C, px, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr, SQUARED: tl.constexpr, SIGMOID: tl.constexpr,
    GENERAL: tl.constexpr, DENSE: tl.constexpr, EXTRA: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dLoss/dmap of one map into rows [C, T] at p_out; returns its sum over classes with the map itself [1, T].

    That sum is what attention needs: with x the map and G its gradient, dLoss/dscore_i = a_i (G . P_i - G . x).
    p_target: the rows of the target at the pixels; p_factors: a and b of targets.py; both only read if GENERAL.
    """
    g_ce = tl.load(p_grad)
    live = label >= 0  # a pixel past the border pulls at nothing
    if GENERAL:
        along = general_gradient(
            operator, p_rows, p_attention, p_out, p_target, p_factors, label, p_grad, p_w, p_bias, p_entry, size,
            first_pair, width, C, px, T, CT, MANY, SQUARED, SIGMOID, DENSE, EXTRA, BOUNDED, ACC,
        )  # fmt: skip
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
        inverse = tl.where(live, 1 / total, 0.0)
        tl.debug_barrier()
        mean = tl.zeros_like(label)
        for c0 in range(0, C, CT):
            e, _ = exponentials(load_classes(p_out, c0, C, px >= 0, -float("inf"), T, CT, True), top, CT)
            s = scaled(e, inverse, CT)
            mean += _dot(s, _pulls(p_grad, s, label, c0, C, SQUARED, CT, True), CT)
        along = tl.zeros_like(label)
        for c0 in range(0, C, CT):
            x = load_classes(p_out, c0, C, px >= 0, -float("inf"), T, CT, True)
            e, _ = exponentials(x, top, CT)
            s = scaled(e, inverse, CT)
            gradient = _gradient(s, _pulls(p_grad, s, label, c0, C, SQUARED, CT, True), mean, g_ce, label, c0, CT)
            for c in tl.static_range(CT):
                along += tl.where(c0 + c < C, gradient[c] * x[c], 0.0)
            store_classes(p_out, gradient, c0, C, px >= 0, T, CT, True)
    else:
        x = make_map(
            operator, p_rows, p_attention, p_out, p_w, p_bias, p_entry, size, first_pair, width, 0, C, px, T, CT, False,
            EXTRA, BOUNDED, ACC,
        )  # fmt: skip
        top = largest(x, CT)
        e, total = exponentials(x, top, CT)
        inverse = tl.where(live, 1 / total, 0.0)
        s = scaled(e, inverse, CT)
        pulls = _pulls(p_grad, s, label, 0, C, SQUARED, CT, False)
        gradient = _gradient(s, pulls, _dot(s, pulls, CT), g_ce, label, 0, CT)
        along = _dot(gradient, x, CT)
        store_classes(p_out, gradient, 0, C, px >= 0, T, CT, False)
    return along
