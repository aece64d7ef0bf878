"""The gradients of all maps, subset by subset, for one tile of the image at a time."""

import triton
import triton.language as tl

from .adjoint import tile_gradients
from .labels import stage_labels
from .maps import (
    ADD,
    AWF,
    CAT,
    ENTRY,
    FIRST_PAIR,
    LMAX,
    MAP,
    MEMBERS,
    MUL,
    SIZE,
    attend,
    below,
    both,
    cat_rows,
    exponentials,
    join_tile,
    largest,
    load_classes,
    make_map,
    multiply_rows,
    plus,
    plus_scaled,
    plus_weighted,
    scaled,
    store_classes,
    times,
)
from .pixels import tile_origin, wide
from .stage import stage_logits


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
def _map_gradient(
    operator, p_rows, p_attention, p_out, label, p_grad, p_w, p_bias, p_entry, size, first_pair, width, C, px,
    T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr, SQUARED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dLoss/dmap of one map into rows [C, T] at p_out; returns its sum over classes with the map itself [1, T].

    That sum is what attention needs: with x the map and G its gradient, dLoss/dscore_i = a_i (G . P_i - G . x).
    """
    g_ce = tl.load(p_grad)
    live = label >= 0  # a pixel past the border pulls at nothing
    if MANY:
        top = tl.zeros_like(label) - float("inf")
        total = tl.zeros_like(label)
        for c0 in range(0, C, CT):
            x = make_map(
                operator, p_rows, p_attention, p_out, p_w, p_bias, p_entry, size, first_pair, width, c0, C, px, T, CT,
                True, ACC,
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
            ACC,
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


@triton.jit
def _to_members(
    p_rows, p_grads, p_maps, p_attention, p_scores, p_w, p_u, p_entry, size, first_pair, along, C, px,
    T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Hand the gradients of a subset's maps, rows [4, C, T], to its members' gradients, rows [L, C, T].

    Writes dLoss/dscore of each member's attention to rows p_scores [LMAX, T] on the way.
    """
    has_add = tl.load(p_entry + MAP + ADD) >= 0
    has_mul = tl.load(p_entry + MAP + MUL) >= 0
    has_cat = tl.load(p_entry + MAP + CAT) >= 0
    has_awf = tl.load(p_entry + MAP + AWF) >= 0
    on = px >= 0
    p_add = p_maps + ADD * (C * T) + px
    p_mul = p_maps + MUL * (C * T) + px
    p_cat = p_maps + CAT * (C * T) + px
    p_awf = p_maps + AWF * (C * T) + px
    for j in range(size):
        member = tl.load(p_entry + MEMBERS + j)
        pair = first_pair + j
        p_member = p_rows + member * (C * T) + px
        attention = tl.zeros_like(px).to(ACC)
        score = attention
        if has_awf:
            attention = tl.load(p_attention + j * T + px)
            for c in range(C):
                score += tl.load(p_awf + c * T) * tl.load(p_member + c * T)
            score = attention * (score - along)
            tl.store(p_scores + j * T + px, score)
        for c0 in range(0, C, CT):
            p_out = p_grads + member * (C * T) + px
            total = load_classes(p_out, c0, C, on, 0.0, T, CT, MANY)
            if has_add:
                total = plus(total, load_classes(p_add, c0, C, on, 0.0, T, CT, MANY), CT)
            if has_mul:
                product = load_classes(p_mul, c0, C, on, 0.0, T, CT, MANY)
                for other in range(size):
                    p_other = p_rows + tl.load(p_entry + MEMBERS + other) * (C * T) + px
                    product = times(product, load_classes(p_other, c0, C, both(on, other != j), 1.0, T, CT, MANY), CT)
                total = plus(total, product, CT)
            if has_awf:
                total = plus_scaled(total, attention, load_classes(p_awf, c0, C, on, 0.0, T, CT, MANY), CT)
                total = plus_weighted(total, p_u + pair * C, 1, c0, C, True, score, CT, MANY)
            if has_cat & (not MANY):
                for o in range(C):  # out class
                    value = tl.load(p_cat + o * T)
                    total = plus_weighted(total, p_w + (pair * C + o) * C, 1, c0, C, True, value, CT, MANY)
            store_classes(p_out, total, c0, C, on, T, CT, MANY)
        if MANY:
            if has_cat:
                tl.debug_barrier()
                p_from = p_maps + CAT * (C * T)
                multiply_rows(p_w + pair * (C * C), p_from, p_grads + member * (C * T), C, T, True, SPAN, DOT, ACC)


@triton.jit
def _to_parameters(
    p_rows, p_maps, p_scores, p_pairs, p_entry, size, first_pair, C, T: tl.constexpr, SPAN: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a subset's W, b, u and v to p_pairs [K, C + 1, C + 1].

    One matrix product over the pixels of the tile for each member: rows are the gradient of the cat map and that of
    the attention score, columns the logits of the member and ones. So [:C, :C] is dW, [C, :C] du, [:C, C] db (the
    same for each member), [C, C] dv.
    """
    has_cat = tl.load(p_entry + MAP + CAT) >= 0
    has_awf = tl.load(p_entry + MAP + AWF) >= 0
    if has_cat | has_awf:
        zero = tl.load(p_entry + ENTRY - 1)
        for j in range(size):
            p_member = p_rows + tl.load(p_entry + MEMBERS + j) * (C * T)
            p_pair = p_pairs + (first_pair + j) * ((C + 1) * (C + 1))
            for row0 in range(0, C + 1, 16):
                for column0 in range(0, C + 1, 16):
                    row = (row0 + zero + tl.arange(0, 16))[:, None]
                    column = (column0 + zero + tl.arange(0, 16))[None, :]
                    product = tl.zeros((16, 16), ACC)
                    for q in range(0, T, SPAN):
                        px = q + zero + tl.arange(0, SPAN)
                        cat = p_maps + CAT * (C * T) + row * T + px[None, :]
                        left = tl.load(cat, mask=both(row < C, has_cat), other=0.0)  # [16, SPAN]
                        if has_awf & (row0 + 16 > C):
                            left += tl.load(p_scores + j * T + px[None, :] + 0 * row, mask=row == C, other=0.0)
                        right = tl.load(p_member + column * T + px[:, None], mask=column < C, other=0.0)
                        right = tl.where(column == C, 1.0, right)  # [SPAN, 16]
                        product = tl.dot(left, right, product, input_precision=DOT, out_dtype=ACC)
                    p_out = p_pair + row * (C + 1) + column
                    keep = (row <= C) & (column <= C)
                    tl.store(p_out, tl.load(p_out, mask=keep, other=0.0) + product, mask=keep)


RUN_TIME = [
    *("C", "L", "M", "K", "items", "chunks", "chunk_tiles", "tiles", "subsets", "program_rows"),
]


@triton.jit(do_not_specialize=RUN_TIME)
def gradients_kernel(
    p_grad_stats,  # [B, M, 1 + 2C]
    logits,  # six pointers; scales past L repeat the first
    grads,  # likewise: gradients of the logits, written here for scales at full size only
    p_target,
    p_w,  # [K, C, C]
    p_bias,  # [S, C]
    p_u,  # [K, C]
    p_v,  # [K]
    p_geometry,  # int64 [1 + L, FIELDS]
    p_table,  # int32 [subsets, TABLE_ROW]
    p_partial,  # gradients of the tiles at native resolution, see adjoint.py
    p_pairs,  # [items, K, C + 1, C + 1], zeros at first
    p_scratch,  # [programs, program_rows, T]
    C,
    L,
    M,
    K,
    items,
    chunks,
    chunk_tiles,
    tiles,
    subsets,
    program_rows,
    CT: tl.constexpr,
    MANY: tl.constexpr,
    DIMS: tl.constexpr,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARED: tl.constexpr,
    LEARNED: tl.constexpr,
    SPAN: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients from the tiles of an item.

    1. Interpolate the logits of a tile into the scratch of this program: rows [L, C, T]; clear their gradients.
    2. For each subset: the gradients of its four maps, rows [4, C, T]; these to its members; products with the
       logits to its parameters.
    3. Take the tile's gradients back to native resolution.
    """
    T: tl.constexpr = TZ * TY * TX
    p_rows = p_scratch + wide(tl.program_id(0)) * program_rows * T
    p_grads = p_rows + L * C * T
    p_label = p_grads + L * C * T
    p_attention = p_label + T  # [LMAX, T]
    p_scores = p_attention + LMAX * T  # [LMAX, T]
    p_maps = p_scores + LMAX * T  # [4, C, T]
    px = tl.arange(0, T)[None, :]  # [1, T]
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        b = wide(item // chunks)
        first = item % chunks * chunk_tiles
        p_pair = p_pairs + wide(item) * K * (C + 1) * (C + 1)
        for tile in tl.range(first, tl.minimum(first + chunk_tiles, tiles), disable_licm=True):
            tz, ty, tx = tile_origin(p_geometry, tile, TZ, TY, TX)
            stage_logits(logits, p_geometry, p_rows, b, tz, ty, tx, C, L, T, TZ, TY, TX, DIMS, BLOCK, ACC, WIDE)
            stage_labels(p_target, p_geometry, p_label, b, tz, ty, tx, C, T, TZ, TY, TX, ACC)
            for row in range(L * C):
                tl.store(p_grads + row * T + px, tl.zeros_like(px).to(ACC))
            tl.debug_barrier()
            label = tl.load(p_label + px)
            for r in tl.range(subsets, disable_licm=True):
                p_entry = p_table + r * ENTRY
                width = tl.load(p_entry + SIZE)
                first_pair = tl.load(p_entry + FIRST_PAIR)
                p_map = p_entry + tl.zeros((1, 1), tl.int32)  # the same row for what works on ROWS of them
                size = tl.load(p_map + SIZE)  # [1, 1]
                pairs = tl.load(p_map + FIRST_PAIR)
                if tl.load(p_entry + MAP + AWF) >= 0:
                    attend(p_rows, p_attention + px, p_u, p_v, p_map, size, pairs, width, C, px, T, ACC)
                    tl.debug_barrier()
                along = tl.zeros_like(label)
                for operator in range(4):
                    number = tl.load(p_entry + MAP + operator)
                    if number >= 0:
                        if MANY:
                            if operator == CAT:
                                cat_rows(p_rows, p_maps + CAT * (C * T), p_w, p_bias, p_entry, C, T, SPAN, DOT, ACC)
                        along = _map_gradient(
                            operator, p_rows, p_attention + px, p_maps + operator * (C * T) + px, label,
                            p_grad_stats + (b * M + number) * (1 + 2 * C), p_w, p_bias, p_map, size, pairs,
                            width, C, px, T, CT, MANY, SQUARED, ACC,
                        )  # fmt: skip
                tl.debug_barrier()  # along is that of awf, the last of the four, where there is one
                _to_members(
                    p_rows, p_grads, p_maps, p_attention, p_scores, p_w, p_u, p_entry, width, first_pair, along, C,
                    px, T, CT, MANY, SPAN, DOT, ACC,
                )  # fmt: skip
                tl.debug_barrier()
                if LEARNED:
                    _to_parameters(p_rows, p_maps, p_scores, p_pair, p_entry, width, first_pair, C, T, SPAN, DOT, ACC)
                    tl.debug_barrier()
            # The maps' rows are free again: they hold what is between full and native resolution.
            tile_gradients(
                p_grads, p_maps, grads, p_geometry, p_partial, b, tile, tiles, tz, ty, tx, C, L, T, TZ, TY, TX,
                DIMS, BLOCK, DOT, ACC, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
