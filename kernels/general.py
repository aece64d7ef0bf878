"""The statistics of maps under general targets: weights, several classes at once, smoothed labels, sigmoids.

With y_c the target of a pixel, t_c its share in cross-entropy, and wd and wc its weights, the sums over the pixels are
CE = wc sum_c t_c (log sum_k exp x_k - x_c), or for sigmoids wc sum_c (-t_c log s_c - (1 - y_c) log(1 - s_c));
I_c = wd s_c y_c and Q_c = wd s_c^q. forward.py has the same for class numbers that all count alike.
"""

import triton
import triton.language as tl

from .maps import (
    CAT,
    ENTRY,
    SIZE,
    add_to,
    cat_rows,
    exponentials,
    filled,
    join_tile,
    largest,
    load_classes,
    make_map,
    scaled,
    store_classes,
    store_sums,
)
from .sigmoid import binary_cross_entropy, sigmoids
from .targets import target_of


@triton.jit
def _accumulate(
    sums, s, p_target, p_factors, label, c0, C, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    SQUARED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Add the probabilities [ROWS, PX] of one step to the sums (I_c..., Q_c...)."""
    weight = tl.load(p_target + T)
    out = ()
    for c in tl.static_range(CT):
        y, _ = target_of(p_target, p_factors, label, c0 + c, C, T, DENSE, MANY)
        out = out + (sums[c] + weight * s[c] * y,)
    for c in tl.static_range(CT):
        out = out + (sums[CT + c] + weight * (s[c] * s[c] if SQUARED else s[c]),)
    return out


@triton.jit
def _shares(
    x, top, p_target, p_factors, label, c0, C, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Sums over classes of t_c, and of t_c (top - x_c), where a class without a share counts 0 even at infinity."""
    total = tl.zeros_like(top)
    missed = tl.zeros_like(top)
    for c in tl.static_range(CT):
        _, t = target_of(p_target, p_factors, label, c0 + c, C, T, DENSE, MANY)
        total += t
        missed += tl.where(t == 0, 0.0, t * (top - x[c]))
    return total, missed


@triton.jit
def _weighted(weight, value):
    """Return weight * value, 0 where the weight is 0 though the value be infinite."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def general_few(
    operator, p_rows, p_attention, p_target, p_factors, p_w, p_bias, p_entry, size, first_pair, width, p_map, known,
    lane, C, T: tl.constexpr, PX: tl.constexpr, CT: tl.constexpr, SQUARED: tl.constexpr, DENSE: tl.constexpr,
    EXTRA: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS maps under softmax, with all their classes in registers."""
    zero = tl.zeros_like(lane).to(ACC)
    ce = zero
    sums = filled(0.0, zero, 2 * CT)
    for q in range(0, T, PX):
        px = lane + q  # [ROWS, PX]
        p_here = p_target + px
        label = tl.load(p_here)
        x = make_map(
            operator, p_rows, p_attention + px, p_attention + px, p_w, p_bias, p_entry, size, first_pair, width, 0,
            C, px, T, CT, False, EXTRA, BOUNDED, ACC,
        )  # fmt: skip
        top = largest(x, CT)
        share, missed = _shares(x, top, p_here, p_factors, label, 0, C, T, CT, False, DENSE)
        e, total = exponentials(x, top, CT)
        weight = tl.load(p_here + 2 * T)
        ce += _weighted(weight, missed) + weight * (share * tl.log(total))
        s = scaled(e, 1 / total, CT)
        sums = _accumulate(sums, s, p_here, p_factors, label, 0, C, T, CT, False, SQUARED, DENSE)
    add_to(p_map, ce, known)
    store_sums(p_map, sums, 0, C, known, CT, False)


@triton.jit
def general_many(
    operator, p_rows, p_attention, p_target, p_factors, p_values, p_w, p_bias, p_entry, size, first_pair, width, p_map,
    known, lane, row, C, T: tl.constexpr, PX: tl.constexpr, CT: tl.constexpr, SQUARED: tl.constexpr,
    DENSE: tl.constexpr, EXTRA: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS maps under softmax, CT classes at a time; `cat` has been made before.

    p_values: scratch rows [ROWS, C + 2, T]: the map, then the maximum and the sum of exponentials of each pixel.
    """
    zero = tl.zeros_like(lane).to(ACC)
    p_own = p_values + row * ((C + 2) * T)
    ce = zero
    for q in range(0, T, PX):
        px = lane + q
        top = zero - float("inf")
        total = zero
        for c0 in range(0, C, CT):
            x = make_map(
                operator, p_rows, p_attention + px, p_own + px, p_w, p_bias, p_entry, size, first_pair, width, c0,
                C, px, T, CT, True, EXTRA, BOUNDED, ACC,
            )  # fmt: skip
            store_classes(p_own + px, x, c0, C, px >= 0, T, CT, True)
            top, total = join_tile(x, top, total, CT)
        tl.store(p_own + C * T + px, top)
        tl.store(p_own + (C + 1) * T + px, total)
    tl.debug_barrier()
    for c0 in range(0, C, CT):
        sums = filled(0.0, zero, 2 * CT)
        for q in range(0, T, PX):
            px = lane + q
            p_here = p_target + px
            label = tl.load(p_here)
            top = tl.load(p_own + C * T + px)
            total = tl.load(p_own + (C + 1) * T + px)
            x = load_classes(p_own + px, c0, C, px >= 0, -float("inf"), T, CT, True)
            share, missed = _shares(x, top, p_here, p_factors, label, c0, C, T, CT, True, DENSE)
            weight = tl.load(p_here + 2 * T)
            ce += _weighted(weight, missed) + weight * (share * tl.log(total))
            e, _ = exponentials(x, top, CT)
            s = scaled(e, 1 / total, CT)
            sums = _accumulate(sums, s, p_here, p_factors, label, c0, C, T, CT, True, SQUARED, DENSE)
        store_sums(p_map, sums, c0, C, known, CT, True)
    add_to(p_map, ce, known)
    tl.debug_barrier()


@triton.jit
def sigmoid_sums(
    operator, p_rows, p_attention, p_target, p_factors, p_made, p_w, p_bias, p_entry, size, first_pair, width, p_map,
    known, lane, c0, C, T: tl.constexpr, PX: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr, SQUARED: tl.constexpr,
    DENSE: tl.constexpr, EXTRA: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS maps under sigmoids, classes c0 .. c0 + CT - 1; with MANY, `cat` has been made before: p_made."""
    zero = tl.zeros_like(lane).to(ACC)
    ce = zero
    sums = filled(0.0, zero, 2 * CT)
    for q in range(0, T, PX):
        px = lane + q
        p_here = p_target + px
        label = tl.load(p_here)
        x = make_map(
            operator, p_rows, p_attention + px, p_made + px, p_w, p_bias, p_entry, size, first_pair, width, c0, C, px,
            T, CT, MANY, EXTRA, BOUNDED, ACC,
        )  # fmt: skip
        missed = zero
        s = ()
        for c in tl.static_range(CT):
            y, t = target_of(p_here, p_factors, label, c0 + c, C, T, DENSE, MANY)
            e, own, _ = sigmoids(x[c])
            entropy = binary_cross_entropy(x[c], e, y, t, ACC)
            missed += tl.where(c0 + c < C, entropy, 0.0) if MANY else entropy
            s = s + (own,)
        ce += tl.load(p_here + 2 * T) * missed  # NaN stays NaN under a weight of 0, as in plain PyTorch
        sums = _accumulate(sums, s, p_here, p_factors, label, c0, C, T, CT, MANY, SQUARED, DENSE)
    add_to(p_map, ce, known)
    store_sums(p_map, sums, c0, C, known, CT, MANY)


@triton.jit
def general_sums(
    operator, p_rows, p_attention, p_target, p_factors, p_values, p_w, p_bias, p_table, p_entry, size, first_pair,
    width, p_map, known, lane, row, C, T: tl.constexpr, PX: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    SQUARED: tl.constexpr, SIGMOID: tl.constexpr, DENSE: tl.constexpr, EXTRA: tl.constexpr, BOUNDED: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS maps. p_target: rows of the tile's target, see targets.py; p_factors: a and b, [2, C].

    p_values: scratch rows [ROWS, C + 2, T], used for many classes.
    """
    if MANY:
        if operator == CAT:
            for r in range(row.shape[0]):
                p_one = p_table + r * ENTRY
                if tl.load(p_one + SIZE) > 0:
                    cat_rows(p_rows, p_values + r * ((C + 2) * T), p_w, p_bias, p_one, C, T, SPAN, DOT, ACC)
            tl.debug_barrier()
    if SIGMOID:
        p_made = p_values + row * ((C + 2) * T)
        for c0 in range(0, C if MANY else 1, CT):
            sigmoid_sums(
                operator, p_rows, p_attention, p_target, p_factors, p_made, p_w, p_bias, p_entry, size, first_pair,
                width, p_map, known, lane, c0 if MANY else 0, C, T, PX, CT, MANY, SQUARED, DENSE, EXTRA, BOUNDED, ACC,
            )  # fmt: skip
        if MANY:
            tl.debug_barrier()
    elif MANY:
        general_many(
            operator, p_rows, p_attention, p_target, p_factors, p_values, p_w, p_bias, p_entry, size, first_pair, width,
            p_map, known, lane, row, C, T, PX, CT, SQUARED, DENSE, EXTRA, BOUNDED, ACC,
        )  # fmt: skip
    else:
        general_few(
            operator, p_rows, p_attention, p_target, p_factors, p_w, p_bias, p_entry, size, first_pair, width, p_map,
            known, lane, C, T, PX, CT, SQUARED, DENSE, EXTRA, BOUNDED, ACC,
        )  # fmt: skip
