"""The gradients of all maps, subset by subset, for one tile of the image at a time."""

import triton
import triton.language as tl

from .adjoint import tile_gradients
from .map_gradient import map_gradient
from .maps import (
    ADD,
    ALL,
    AVG,
    AWF,
    CAT,
    ENTRY,
    FIRST_PAIR,
    LMAX,
    MAP,
    MAX,
    MEMBERS,
    MUL,
    SIZE,
    SUB,
    USUAL,
    attend,
    both,
    bounded_partial,
    cat_rows,
    load_classes,
    multiply_rows,
    plus,
    plus_scaled,
    plus_weighted,
    store_classes,
    times,
    unless_beaten,
)
from .pixels import tile_origin, wide
from .stage import stage_logits
from .targets import stage_target


@triton.jit
def _plus_extra(
    total, p_rows, p_maps, p_entry, size, j, c0, C, px, T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Add to `total` what member j gets of the gradients of a subset's difference, mean and maximum."""
    on = px >= 0
    if tl.load(p_entry + MAP + SUB) >= 0:
        sign = tl.zeros_like(px).to(ACC) + tl.where(j > 0, -1.0, 1.0)
        total = plus_scaled(total, sign, load_classes(p_maps + SUB * (C * T) + px, c0, C, on, 0.0, T, CT, MANY), CT)
    if tl.load(p_entry + MAP + AVG) >= 0:
        share = 1 / (tl.zeros_like(px) + size).to(ACC)
        total = plus_scaled(total, share, load_classes(p_maps + AVG * (C * T) + px, c0, C, on, 0.0, T, CT, MANY), CT)
    if tl.load(p_entry + MAP + MAX) >= 0:
        gradient = load_classes(p_maps + MAX * (C * T) + px, c0, C, on, 0.0, T, CT, MANY)
        p_mine = p_rows + tl.load(p_entry + MEMBERS + j) * (C * T) + px
        mine = load_classes(p_mine, c0, C, on, 0.0, T, CT, MANY)
        for other in range(size):
            p_other = p_rows + tl.load(p_entry + MEMBERS + other) * (C * T) + px
            rival = load_classes(p_other, c0, C, on, 0.0, T, CT, MANY)
            gradient = unless_beaten(gradient, mine, rival, other < j, CT)
        total = plus(total, gradient, CT)
    return total


@triton.jit
def _to_members(
    p_rows, p_grads, p_maps, p_attention, p_scores, p_w, p_u, p_entry, size, first_pair, along, C, px,
    T: tl.constexpr, CT: tl.constexpr, MANY: tl.constexpr, EXTRA: tl.constexpr, BOUNDED: tl.constexpr,
    SPAN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Hand the gradients of a subset's maps, rows [4 or 7, C, T], to its members' gradients, rows [L, C, T].

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
                    if BOUNDED:
                        factors = load_classes(p_other, c0, C, on, 1.0, T, CT, MANY)
                        product = times(product, bounded_partial(factors, other == j, CT), CT)
                    else:
                        factors = load_classes(p_other, c0, C, both(on, other != j), 1.0, T, CT, MANY)
                        product = times(product, factors, CT)
                total = plus(total, product, CT)
            if has_awf:
                total = plus_scaled(total, attention, load_classes(p_awf, c0, C, on, 0.0, T, CT, MANY), CT)
                total = plus_weighted(total, p_u + pair * C, 1, c0, C, True, score, CT, MANY)
            if has_cat & (not MANY):
                for o in range(C):  # out class
                    value = tl.load(p_cat + o * T)
                    total = plus_weighted(total, p_w + (pair * C + o) * C, 1, c0, C, True, value, CT, MANY)
            if EXTRA:
                total = _plus_extra(total, p_rows, p_maps, p_entry, size, j, c0, C, px, T, CT, MANY, ACC)
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
    logits,  # MAX_SCALES pointers; scales past L repeat the first
    grads,  # likewise: gradients of the logits, written here for scales at full size only
    p_target,
    p_weight,  # weights of pixels, read if WEIGHTED
    p_factors,  # a and b of targets.py, [2, C], read if GENERAL
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
    SIGMOID: tl.constexpr,
    GENERAL: tl.constexpr,
    DENSE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXTRA: tl.constexpr,
    BOUNDED: tl.constexpr,
    LEARNED: tl.constexpr,
    SPAN: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients from the tiles of an item.

    1. Interpolate the logits of a tile into the scratch of this program: rows [L, C, T]; clear their gradients.
    2. For each subset: the gradients of its maps, rows [4, C, T] (7 if EXTRA); these to its members; products with the
       logits to its parameters.
    3. Take the tile's gradients back to native resolution.
    """
    T: tl.constexpr = TZ * TY * TX
    p_rows = p_scratch + wide(tl.program_id(0)) * program_rows * T
    p_grads = p_rows + L * C * T
    p_label = p_grads + L * C * T
    p_attention = p_label + T  # [LMAX, T]
    if GENERAL:
        p_attention += 2 * T
    if DENSE:
        p_attention += C * T
    p_scores = p_attention + LMAX * T  # [LMAX, T]
    p_maps = p_scores + LMAX * T  # [4 or 7, C, T]
    px = tl.arange(0, T)[None, :]  # [1, T]
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        b = wide(item // chunks)
        first = item % chunks * chunk_tiles
        p_pair = p_pairs + wide(item) * K * (C + 1) * (C + 1)
        for tile in tl.range(first, tl.minimum(first + chunk_tiles, tiles), disable_licm=True):
            tz, ty, tx = tile_origin(p_geometry, tile, TZ, TY, TX)
            stage_logits(logits, p_geometry, p_rows, b, tz, ty, tx, C, L, T, TZ, TY, TX, DIMS, BLOCK, ACC, WIDE)
            stage_target(
                p_target, p_weight, p_geometry, p_label, b, tz, ty, tx, C, T, TZ, TY, TX, GENERAL, DENSE, WEIGHTED, ACC
            )  # fmt: skip
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
                for operator in range(ALL if EXTRA else USUAL):
                    number = tl.load(p_entry + MAP + operator)
                    if number >= 0:
                        if MANY:
                            if operator == CAT:
                                cat_rows(p_rows, p_maps + CAT * (C * T), p_w, p_bias, p_entry, C, T, SPAN, DOT, ACC)
                        found = map_gradient(
                            operator, p_rows, p_attention + px, p_maps + operator * (C * T) + px, p_label + px,
                            p_factors, label, p_grad_stats + (b * M + number) * (1 + 2 * C), p_w, p_bias, p_map, size,
                            pairs, width, C, px, T, CT, MANY, SQUARED, SIGMOID, GENERAL, DENSE, EXTRA, BOUNDED, ACC,
                        )  # fmt: skip
                        # In the end it is that of awf, the last of the four, where there is one.
                        along = tl.where(operator <= AWF, found, along) if EXTRA else found
                tl.debug_barrier()
                _to_members(
                    p_rows, p_grads, p_maps, p_attention, p_scores, p_w, p_u, p_entry, width, first_pair, along, C,
                    px, T, CT, MANY, EXTRA, BOUNDED, SPAN, DOT, ACC,
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
