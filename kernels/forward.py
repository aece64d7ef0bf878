"""The statistics of all maps: one pass over the tiles of the image."""

import triton
import triton.language as tl

from .general import general_sums
from .maps import (
    AWF,
    CAT,
    ENTRY,
    FIRST_PAIR,
    LMAX,
    MAP,
    SIZE,
    add_to,
    at_label,
    attend,
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
from .pixels import tile_origin, wide
from .stage import stage_logits
from .targets import stage_target


@triton.jit
def _accumulate(sums, s, label, c0, SQUARED: tl.constexpr, CT: tl.constexpr):
    """Add the probabilities [ROWS, PX] of one step to the sums (I_c..., Q_c...)."""
    out = ()
    for c in tl.static_range(CT):
        out = out + (sums[c] + tl.where(label == c0 + c, s[c], 0.0),)
    for c in tl.static_range(CT):
        out = out + (sums[CT + c] + (s[c] * s[c] if SQUARED else s[c]),)
    return out


@triton.jit
def _few_classes(
    operator, p_rows, p_attention, p_label, p_w, p_bias, p_entry, size, first_pair, width, p_map, known, lane,
    C, T: tl.constexpr, PX: tl.constexpr, CT: tl.constexpr, SQUARED: tl.constexpr, EXTRA: tl.constexpr,
    BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS maps with all their classes in registers."""
    zero = tl.zeros_like(lane).to(ACC)
    ce = zero
    sums = filled(0.0, zero, 2 * CT)
    for q in range(0, T, PX):
        px = lane + q  # [ROWS, PX]
        label = tl.load(p_label + px)
        x = make_map(
            operator, p_rows, p_attention + px, p_attention + px, p_w, p_bias, p_entry, size, first_pair, width, 0,
            C, px, T, CT, False, EXTRA, BOUNDED, ACC,
        )  # fmt: skip
        top = largest(x, CT)
        e, total = exponentials(x, top, CT)
        # A pixel without a label has no part in any sum.
        ce += tl.where(label >= 0, (top - at_label(x, label, 0, CT)) + tl.log(total), 0.0)
        s = scaled(e, tl.where(label >= 0, 1 / total, 0.0), CT)
        sums = _accumulate(sums, s, label, 0, SQUARED, CT)
    add_to(p_map, ce, known)
    store_sums(p_map, sums, 0, C, known, CT, False)


@triton.jit
def _many_classes(
    operator, p_rows, p_attention, p_label, p_values, p_w, p_bias, p_table, p_entry, size, first_pair, width, p_map,
    known, lane, row, C, T: tl.constexpr, PX: tl.constexpr, CT: tl.constexpr, SQUARED: tl.constexpr,
    EXTRA: tl.constexpr, BOUNDED: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS maps, CT classes at a time: first the normalisation of each pixel, then the probabilities.

    p_values: scratch rows [ROWS, C + 2, T]: the map, then the maximum and the inverse sum of each pixel.
    """
    zero = tl.zeros_like(lane).to(ACC)
    p_own = p_values + row * ((C + 2) * T)
    ce = zero
    if operator == CAT:
        for r in range(row.shape[0]):
            p_one = p_table + r * ENTRY
            if tl.load(p_one + SIZE) > 0:
                cat_rows(p_rows, p_values + r * ((C + 2) * T), p_w, p_bias, p_one, C, T, SPAN, DOT, ACC)
        tl.debug_barrier()
    for q in range(0, T, PX):
        px = lane + q
        label = tl.load(p_label + px)
        top = zero - float("inf")
        total = zero
        chosen = zero
        for c0 in range(0, C, CT):
            x = make_map(
                operator, p_rows, p_attention + px, p_own + px, p_w, p_bias, p_entry, size, first_pair, width, c0,
                C, px, T, CT, True, EXTRA, BOUNDED, ACC,
            )  # fmt: skip
            store_classes(p_own + px, x, c0, C, px >= 0, T, CT, True)
            top, total = join_tile(x, top, total, CT)
            chosen += at_label(x, label, c0, CT)
        ce += tl.where(label >= 0, (top - chosen) + tl.log(total), 0.0)
        tl.store(p_own + C * T + px, top)
        tl.store(p_own + (C + 1) * T + px, tl.where(label >= 0, 1 / total, 0.0))
    add_to(p_map, ce, known)
    tl.debug_barrier()
    for c0 in range(0, C, CT):
        sums = filled(0.0, zero, 2 * CT)
        for q in range(0, T, PX):
            px = lane + q
            top = tl.load(p_own + C * T + px)
            x = load_classes(p_own + px, c0, C, px >= 0, -float("inf"), T, CT, True)
            e, _ = exponentials(x, top, CT)
            s = scaled(e, tl.load(p_own + (C + 1) * T + px), CT)
            sums = _accumulate(sums, s, tl.load(p_label + px), c0, SQUARED, CT)
        store_sums(p_map, sums, c0, C, known, CT, True)
    tl.debug_barrier()


RUN_TIME = ["C", "L", "M", "items", "chunks", "chunk_tiles", "tiles", "groups", "program_rows"]


@triton.jit(do_not_specialize=RUN_TIME)
def statistics_kernel(
    logits,  # MAX_SCALES pointers; scales past L repeat the first
    p_target,
    p_weight,  # weights of pixels, read if WEIGHTED
    p_factors,  # a and b of targets.py, [2, C], read if GENERAL
    p_w,  # [K, C, C]
    p_bias,  # [S, C]
    p_u,  # [K, C]
    p_v,  # [K]
    p_geometry,  # int64 [1 + L, FIELDS]
    p_groups,  # int32 [groups, 2]: operator, largest size
    p_table,  # int32 [groups * ROWS, TABLE_ROW], ROWS maps of one operator a group
    p_stats,  # [items, M, 1 + 2C], zeros at first
    p_counts,  # int32 [items, 1 + C], zeros at first: labels that are no class, labels of each class
    p_scratch,  # [programs, program_rows, T]
    C,
    L,
    M,
    items,  # parts of samples, each done by one program in order
    chunks,  # items a sample
    chunk_tiles,  # tiles an item
    tiles,  # tiles a sample
    groups,
    program_rows,
    CT: tl.constexpr,
    MANY: tl.constexpr,
    DIMS: tl.constexpr,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    ROWS: tl.constexpr,
    PX: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARED: tl.constexpr,
    SIGMOID: tl.constexpr,
    GENERAL: tl.constexpr,
    DENSE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXTRA: tl.constexpr,
    BOUNDED: tl.constexpr,
    SPAN: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Statistics of every map over the tiles of an item.

    1. Interpolate the logits of a tile into the scratch of this program: rows [L, C, T], then labels [T].
       When GENERAL, weights and a dense target follow them: see targets.py.
    2. Count its labels, unless the target is DENSE.
    3. For ROWS maps of one operator at a time: make them, softmax, sums. Each warp has its own map and goes through
       the whole tile, so that sums cross threads once a tile.
    """
    T: tl.constexpr = TZ * TY * TX
    p_rows = p_scratch + wide(tl.program_id(0)) * program_rows * T
    p_label = p_rows + L * C * T
    p_attention = p_label + T  # [ROWS, LMAX, T]
    if GENERAL:
        p_attention += 2 * T
    if DENSE:
        p_attention += C * T
    p_values = p_attention + ROWS * LMAX * T  # [ROWS, C + 2, T], used for many classes
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, PX)[None, :] + tl.zeros_like(row)  # [ROWS, PX]
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        b = wide(item // chunks)
        first = item % chunks * chunk_tiles
        p_item = p_stats + wide(item) * M * (1 + 2 * C)
        p_count = p_counts + item * (1 + C)
        for tile in tl.range(first, tl.minimum(first + chunk_tiles, tiles), disable_licm=True):
            tz, ty, tx = tile_origin(p_geometry, tile, TZ, TY, TX)
            stage_logits(logits, p_geometry, p_rows, b, tz, ty, tx, C, L, T, TZ, TY, TX, DIMS, BLOCK, ACC, WIDE)
            bad = stage_target(
                p_target, p_weight, p_geometry, p_label, b, tz, ty, tx, C, T, TZ, TY, TX, GENERAL, DENSE, WEIGHTED, ACC
            )  # fmt: skip
            if not DENSE:
                tl.store(p_count, tl.load(p_count) + bad)
            tl.debug_barrier()
            if not DENSE:
                label = tl.load(p_label + tl.arange(0, T))
                for c in range(C):
                    found = tl.sum((label == c).to(tl.int32), axis=0)
                    tl.store(p_count + 1 + c, tl.load(p_count + 1 + c) + found)
            for g in tl.range(groups, disable_licm=True):
                operator = tl.load(p_groups + 2 * g)
                width = tl.load(p_groups + 2 * g + 1)
                p_entry = p_table + (g * ROWS + row) * ENTRY  # [ROWS, 1]
                size = tl.load(p_entry + SIZE)
                first_pair = tl.load(p_entry + FIRST_PAIR)
                number = tl.load(p_entry + MAP)
                p_map = p_item + number * (1 + 2 * C)
                p_own = p_attention + row * (LMAX * T)
                if operator == AWF:
                    for q in range(0, T, PX):
                        px = lane + q
                        attend(p_rows, p_own + px, p_u, p_v, p_entry, size, first_pair, width, C, px, T, ACC)
                    tl.debug_barrier()
                if GENERAL:
                    general_sums(
                        operator, p_rows, p_own, p_label, p_factors, p_values, p_w, p_bias,
                        p_table + g * ROWS * ENTRY, p_entry, size, first_pair, width, p_map,
                        (number >= 0) & (lane == 0), lane, row, C, T, PX, CT, MANY, SQUARED, SIGMOID, DENSE, EXTRA,
                        BOUNDED, SPAN, DOT, ACC,
                    )  # fmt: skip
                elif MANY:
                    _many_classes(
                        operator, p_rows, p_own, p_label, p_values, p_w, p_bias, p_table + g * ROWS * ENTRY,
                        p_entry, size, first_pair, width, p_map, (number >= 0) & (lane == 0), lane, row, C, T, PX,
                        CT, SQUARED, EXTRA, BOUNDED, SPAN, DOT, ACC,
                    )  # fmt: skip
                else:
                    _few_classes(
                        operator, p_rows, p_own, p_label, p_w, p_bias, p_entry, size, first_pair, width, p_map,
                        (number >= 0) & (lane == 0), lane, C, T, PX, CT, SQUARED, EXTRA, BOUNDED, ACC,
                    )  # fmt: skip
                if operator == AWF:
                    tl.debug_barrier()
            tl.debug_barrier()
