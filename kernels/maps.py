"""The mixes and the softmax, for a vector of CT classes at a time.

A vector of classes is a tuple of CT tensors [ROWS, PX]: ROWS maps side by side (one a warp), PX pixels. Classes are
separate tensors rather than an axis, so C is not padded to a power of two and sums over classes need no shuffles.
The loop over the members of a subset, and that over all C classes where a mix needs them, run at run time: code does
not grow with the number of scales or subsets.
"""

import triton
import triton.language as tl

from ..plan import MAX_SCALES, MUL_BOUND

# One row of integers a map (forward) or a subset (backward); tables.py writes them.
OPERATORS = ("add", "mul", "cat", "awf", "sub", "avg", "max")
TABLE_FIELDS = ("size", "first_pair", "subset", *OPERATORS)  # of each operator: number of the map or -1
MEMBERS_AT = len(TABLE_FIELDS)  # where the members begin
TABLE_ROW = MEMBERS_AT + MAX_SCALES + 1  # the last is always 0: a zero that the compiler knows nothing of

SIZE = tl.constexpr(TABLE_FIELDS.index("size"))
FIRST_PAIR = tl.constexpr(TABLE_FIELDS.index("first_pair"))
SUBSET = tl.constexpr(TABLE_FIELDS.index("subset"))
MAP = tl.constexpr(TABLE_FIELDS.index("add"))  # + operator
MEMBERS = tl.constexpr(MEMBERS_AT)
ENTRY = tl.constexpr(TABLE_ROW)
LMAX = tl.constexpr(MAX_SCALES)

ADD = tl.constexpr(OPERATORS.index("add"))
MUL = tl.constexpr(OPERATORS.index("mul"))
CAT = tl.constexpr(OPERATORS.index("cat"))
AWF = tl.constexpr(OPERATORS.index("awf"))
SUB = tl.constexpr(OPERATORS.index("sub"))
AVG = tl.constexpr(OPERATORS.index("avg"))
MAX = tl.constexpr(OPERATORS.index("max"))
USUAL = tl.constexpr(OPERATORS.index("sub"))  # operators that every compiled kernel knows: those before "sub"
ALL = tl.constexpr(len(OPERATORS))  # and those that it knows with EXTRA
BOUND = tl.constexpr(MUL_BOUND)


@triton.jit
def both(mask, flag):
    """Combine mask & flag, for a tensor and a scalar; the interpreter loses the type of the plain form."""
    return tl.where(flag, mask, False)


@triton.jit
def below(mask, c, C, MANY: tl.constexpr):
    """The mask where class c exists: everywhere unless classes come in several vectors, the last not full."""
    return both(mask, c < C) if MANY else mask


@triton.jit
def filled(value, like, CT: tl.constexpr):
    """A vector of classes that all have one value, in the shape of a tensor."""
    one = tl.full(like.shape, value, like.dtype)
    out = ()
    for _ in tl.static_range(CT):
        out = out + (one,)
    return out


@triton.jit
def load_classes(p_rows, c0, C, mask, other, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr):
    """Classes c0 .. c0 + CT - 1 from rows [C, T] of the scratch; `other` for classes past C and where not `mask`."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (tl.load(p_rows + (c0 + c) * T, mask=below(mask, c0 + c, C, MANY), other=other),)
    return out


@triton.jit
def store_classes(p_rows, values, c0, C, mask, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr):
    """Write classes c0 .. c0 + CT - 1, as far as they are below C, to rows [C, T] of the scratch."""
    for c in tl.static_range(CT):
        tl.store(p_rows + (c0 + c) * T, values[c], mask=below(mask, c0 + c, C, MANY))


@triton.jit
def plus(a, b, CT: tl.constexpr):
    """Return a + b, class by class."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (a[c] + b[c],)
    return out


@triton.jit
def times(a, b, CT: tl.constexpr):
    """Return a * b, class by class."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (a[c] * b[c],)
    return out


@triton.jit
def scaled(a, factor, CT: tl.constexpr):
    """Return a * factor with one factor [ROWS, PX] for all classes."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (a[c] * factor,)
    return out


@triton.jit
def plus_scaled(a, factor, b, CT: tl.constexpr):
    """Return a + factor * b with one factor [ROWS, PX] for all classes."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (a[c] + factor * b[c],)
    return out


@triton.jit
def plus_weighted(a, p_weight, step, c0, C, mask, value, CT: tl.constexpr, MANY: tl.constexpr):
    """Return a + w[c] * value.

    One weight a class, `step` apart from p_weight [ROWS, 1] on; one tensor [ROWS, PX] for all classes.
    """
    out = ()
    for c in tl.static_range(CT):
        weight = tl.load(p_weight + (c0 + c) * step, mask=below(mask, c0 + c, C, MANY), other=0.0)  # [ROWS, 1]
        out = out + (a[c] + weight * value,)
    return out


@triton.jit
def bound_root(p):
    """1 / sqrt(1 + (p / BOUND)^2), without overflow: a bounded factor is p times this, its derivative this cubed."""
    size = tl.abs(p) * (1 / BOUND)
    outer = 1 / tl.maximum(size, 1.0)
    inner = tl.minimum(size, outer)  # of size and 1 / size the one that is at most 1
    return outer / tl.sqrt(1 + inner * inner)


@triton.jit
def bounded_factors(p, on, CT: tl.constexpr):
    """Bounded factors p / sqrt(1 + (p / BOUND)^2); 1 for members that are not `on`."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (tl.where(on, p[c] * bound_root(p[c]), 1.0),)
    return out


@triton.jit
def bounded_partial(p, is_own, CT: tl.constexpr):
    """What a bounded factor is in a derivative of their product: its own derivative if that is_own, else itself."""
    out = ()
    for c in tl.static_range(CT):
        root = bound_root(p[c])
        out = out + (root * tl.where(is_own, root * root, p[c]),)
    return out


@triton.jit
def joined(x, p, operator, j, on, CT: tl.constexpr):
    """Take member j, p, into a sum (ADD, AVG), a difference (SUB) or a maximum (MAX); only where it is `on`."""
    sign = tl.where(operator == SUB, tl.where(j > 0, -1.0, 1.0), 1.0)
    is_max = operator == MAX
    out = ()
    for c in tl.static_range(CT):
        # Written so that what is no number stays none.
        larger = tl.where((x[c] >= p[c]) | (x[c] != x[c]), x[c], p[c])
        larger = tl.where(j > 0, larger, p[c])
        out = out + (tl.where(on, tl.where(is_max, larger, x[c] + sign * p[c]), x[c]),)
    return out


@triton.jit
def unless_beaten(gradient, mine, other, is_earlier, CT: tl.constexpr):
    """The gradient of a maximum where member `mine` is not below `other`, nor equal to it if that one is_earlier.

    What is no number is larger than any that is one.
    """
    out = ()
    for c in tl.static_range(CT):
        is_nan = other[c] != other[c]
        beaten = tl.where(
            is_earlier, (mine[c] <= other[c]) | is_nan, (mine[c] < other[c]) | (is_nan & (mine[c] == mine[c]))
        )
        out = out + (tl.where(beaten, 0.0, gradient[c]),)
    return out


@triton.jit
def hide_missing(x, c0, C, CT: tl.constexpr, MANY: tl.constexpr):
    """Minus infinity for classes past C, so that softmax gives them nothing."""
    if not MANY:
        return x
    out = ()
    for c in tl.static_range(CT):
        out = out + (tl.where(c0 + c < C, x[c], -float("inf")),)
    return out


@triton.jit
def member_rows(p_rows, p_entry, j, on, C, T: tl.constexpr):
    """Where the logits of member j of each map begin, among rows [L, C, T]; p_entry, on: [ROWS, 1] or scalars."""
    return p_rows + tl.load(p_entry + MEMBERS + j, mask=on, other=0) * (C * T)


@triton.jit
def attend(p_rows, p_attention, p_u, p_v, p_entry, size, first_pair, width, C, px, T: tl.constexpr, ACC: tl.constexpr):
    """Attention of each member: softmax over members of u . P + v, into rows [ROWS, LMAX, T].

    p_rows: interpolated logits [L, C, T]. p_attention [ROWS, PX]: first row of each map's, at the pixels.
    p_entry, size, first_pair [ROWS, 1]: table rows of the maps. width: the largest size.
    """
    zero = tl.zeros_like(px).to(ACC)
    top = zero - float("inf")
    for j in range(width):
        on = j < size  # [ROWS, 1]
        pair = first_pair + j
        p_member = member_rows(p_rows, p_entry, j, on, C, T) + px
        score = zero + tl.load(p_v + pair, mask=on, other=0.0)
        for c in range(C):
            weight = tl.load(p_u + pair * C + c, mask=on, other=0.0)
            score += weight * tl.load(p_member + c * T, mask=on, other=0.0)
        tl.store(p_attention + j * T, score, mask=on)
        top = tl.where(on, tl.maximum(top, score), top)
    total = zero
    for j in range(width):
        on = j < size
        e = tl.exp(tl.load(p_attention + j * T, mask=on, other=0.0) - top)
        total += tl.where(on, e, 0.0)
        tl.store(p_attention + j * T, e, mask=on)
    inverse = 1 / total
    for j in range(width):
        on = j < size
        tl.store(p_attention + j * T, inverse * tl.load(p_attention + j * T, mask=on, other=0.0), mask=on)


@triton.jit
def make_map(
    operator,
    p_rows,
    p_attention,
    p_made,
    p_w,
    p_bias,
    p_entry,
    size,
    first_pair,
    width,
    c0,
    C,
    px,
    T: tl.constexpr,
    CT: tl.constexpr,
    MANY: tl.constexpr,
    EXTRA: tl.constexpr,
    BOUNDED: tl.constexpr,
    ACC: tl.constexpr,
):
    """Classes c0 .. c0 + CT - 1 of the maps of one operator, minus infinity past C; arguments as for `attend`.

    Parameters: p_w [K, C, C] (pair, out class, in class), p_bias [S, C]. With MANY classes `cat` has been made before,
    by `cat_rows`: p_made, rows [C, T] at the pixels. EXTRA: the operators from SUB on may come up. BOUNDED: MUL takes
    bounded factors.
    """
    like = tl.zeros_like(px).to(ACC)
    if operator == MUL:
        x = filled(1.0, like, CT)
        for j in range(width):
            on = j < size
            p_member = member_rows(p_rows, p_entry, j, on, C, T) + px
            factors = load_classes(p_member, c0, C, on, 1.0, T, CT, MANY)
            x = times(x, bounded_factors(factors, on, CT) if BOUNDED else factors, CT)
    elif operator == CAT:
        if MANY:
            x = load_classes(p_made, c0, C, px >= 0, 0.0, T, CT, MANY)
        else:
            subset = tl.load(p_entry + SUBSET, mask=size > 0, other=0)
            x = plus_weighted(filled(0.0, like, CT), p_bias + subset * C, 1, c0, C, size > 0, 1.0, CT, MANY)
            for j in range(width):
                on = j < size
                p_member = member_rows(p_rows, p_entry, j, on, C, T) + px
                p_matrix = p_w + (first_pair + j) * (C * C)
                for c in range(C):  # in class
                    value = tl.load(p_member + c * T, mask=on, other=0.0)
                    x = plus_weighted(x, p_matrix + c, C, c0, C, on, value, CT, MANY)
    elif operator == AWF:
        x = filled(0.0, like, CT)
        for j in range(width):
            on = j < size
            p_member = member_rows(p_rows, p_entry, j, on, C, T) + px
            attention = tl.load(p_attention + j * T, mask=on, other=0.0)
            x = plus_scaled(x, attention, load_classes(p_member, c0, C, on, 0.0, T, CT, MANY), CT)
    else:
        x = filled(0.0, like, CT)
        for j in range(width):
            on = j < size
            p_member = member_rows(p_rows, p_entry, j, on, C, T) + px
            member = load_classes(p_member, c0, C, on, 0.0, T, CT, MANY)
            x = joined(x, member, operator, j, on, CT) if EXTRA else plus(x, member, CT)
        if EXTRA:
            x = scaled(x, tl.where(operator == AVG, 1 / tl.maximum(size, 1).to(ACC), 1.0), CT)
    return hide_missing(x, c0, C, CT, MANY)


@triton.jit
def largest(x, CT: tl.constexpr):
    """The largest of the classes."""
    out = x[0]
    for c in tl.static_range(1, CT):
        out = tl.maximum(out, x[c])
    return out


@triton.jit
def exponentials(x, top, CT: tl.constexpr):
    """exp(x - top) of each class, and their sum."""
    first = tl.exp(x[0] - top)
    out = (first,)
    total = first
    for c in tl.static_range(1, CT):
        e = tl.exp(x[c] - top)
        out = out + (e,)
        total += e
    return out, total


@triton.jit
def at_label(x, label, c0, CT: tl.constexpr):
    """x[label] where the label [ROWS, PX] is one of these classes, 0 elsewhere."""
    out = tl.zeros_like(x[0])
    for c in tl.static_range(CT):
        out += tl.where(label == c0 + c, x[c], 0.0)
    return out


@triton.jit
def join_tile(x, top, total, CT: tl.constexpr):
    """Take more classes into a running maximum and sum of exponentials (online log-sum-exp)."""
    new = tl.maximum(top, largest(x, CT))
    base = tl.where(new == -float("inf"), 0.0, new)  # nothing but minus infinity so far
    _, added = exponentials(x, base, CT)
    return new, total * tl.exp(top - base) + added


@triton.jit
def multiply_rows(
    p_matrix, p_in, p_out, C, T: tl.constexpr, TRANSPOSED: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Add matrix [C, C] times rows [C, T] to rows [C, T]: `cat` of many classes and its adjoint, on matrix units."""
    for q in range(0, T, SPAN):
        px = (q + tl.arange(0, SPAN))[None, :]
        for o0 in range(0, C, 16):
            o = (o0 + tl.arange(0, 16))[:, None]
            p_to = p_out + o * T + px
            product = tl.load(p_to, mask=o < C, other=0.0)  # [16, SPAN]
            for c0 in range(0, C, 16):
                c = c0 + tl.arange(0, 16)
                place = c[None, :] * C + o if TRANSPOSED else o * C + c[None, :]
                matrix = tl.load(p_matrix + place, mask=(o < C) & (c < C)[None, :], other=0.0)  # [16, 16]
                rows = tl.load(p_in + c[:, None] * T + px, mask=(c < C)[:, None], other=0.0)  # [16, SPAN]
                product = tl.dot(matrix, rows, product, input_precision=DOT, out_dtype=ACC)
            tl.store(p_to, product, mask=o < C)


@triton.jit
def cat_rows(
    p_rows, p_out, p_w, p_bias, p_entry, C, T: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One `cat` map of many classes into rows [C, T]; p_entry: the table row of the map."""
    px = tl.arange(0, T)
    subset = tl.load(p_entry + SUBSET)
    for c in range(C):
        tl.store(p_out + c * T + px, tl.zeros((T,), ACC) + tl.load(p_bias + subset * C + c))
    tl.debug_barrier()
    for j in range(tl.load(p_entry + SIZE)):
        p_member = p_rows + tl.load(p_entry + MEMBERS + j) * (C * T)
        pair = tl.load(p_entry + FIRST_PAIR) + j
        multiply_rows(p_w + pair * (C * C), p_member, p_out, C, T, False, SPAN, DOT, ACC)
        tl.debug_barrier()


@triton.jit
def add_to(p_sum, value, mask):
    """Add the sum over the pixels of value [ROWS, PX] to a number of each map; nobody else writes there.

    mask [ROWS, PX] leaves one pixel of a row: as [ROWS, 1] the sum would change threads through shared memory.
    """
    p_each = p_sum + tl.zeros_like(value).to(tl.int32)
    total = tl.sum(value, axis=1, keep_dims=True) + tl.load(p_each, mask=mask, other=0.0)
    tl.store(p_each, total, mask=mask)


@triton.jit
def store_sums(p_map, sums, c0, C, known, CT: tl.constexpr, MANY: tl.constexpr):
    """Add I and Q of classes c0 ... to the table row [1 + 2C] of each map."""
    for c in tl.static_range(CT):
        keep = below(known, c0 + c, C, MANY)
        add_to(p_map + 1 + c0 + c, sums[c], keep)
        add_to(p_map + 1 + C + c0 + c, sums[CT + c], keep)
