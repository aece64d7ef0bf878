"""General targets of a tile: weights of pixels, ignored ones, and values of each class where the target is dense.

Plain class numbers, which all count alike, need none of this: see labels.py. What a pixel needs lies in scratch rows
that follow one another: the label, the weight in Dice, the weight in cross-entropy, and for a dense target the C values
y_c. For class numbers y_c is 1 where the label is c, made by comparing and never stored.
"""

import triton
import triton.language as tl

from .labels import is_ignored, load_labels, stage_labels
from .maps import below
from .pixels import FULL, LABEL, LABEL_CLASS, WEIGHT, WEIGHTED_CE, offset_of, sizes_of
from .stage import coordinates


@triton.jit
def _stage_values(p_target, p_geometry, p_rows, b, z, y, x, inside, px, C, T: tl.constexpr, ACC: tl.constexpr):
    """Fill rows [C, T] with a dense target; returns the pixels that count, of those inside.

    Only a target of one class may have pixels to ignore: those with that value.
    """
    p_pixels = p_target + offset_of(p_geometry + LABEL, b, z, y, x)
    counts = inside
    for c in range(C):
        raw = tl.load(p_pixels + c * tl.load(p_geometry + LABEL_CLASS), mask=inside, other=0)
        ignored = is_ignored(raw, p_geometry)
        tl.store(p_rows + c * T + px, tl.where(ignored, 0.0, raw.to(ACC)))
        counts = counts & ~ignored
    return counts


@triton.jit
def stage_target(
    p_target, p_weight, p_geometry, p_rows, b, tile_z, tile_y, tile_x, C, T: tl.constexpr, TZ: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, GENERAL: tl.constexpr, DENSE: tl.constexpr, WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Fill the rows of a tile's target, from p_rows on: label [T], and when GENERAL weights [2, T] and y [C, T].

    Pixels past the border and ignored ones get the label -1 and no weight.

    Returns how many pixels of the tile have a label that is no class, always 0 for a dense target.
    """
    if GENERAL:
        px, z, y, x = coordinates(0, TZ, TY, TX, T)
        z, y, x = tile_z + z, tile_y + y, tile_x + x
        full_z, full_y, full_x = sizes_of(p_geometry, FULL)
        inside = (z < full_z) & (y < full_y) & (x < full_x)
        bad = 0
        if DENSE:
            counts = _stage_values(p_target, p_geometry, p_rows + 3 * T, b, z, y, x, inside, px, C, T, ACC)
            tl.store(p_rows + px, tl.where(counts, 0.0, -1.0).to(ACC))
        else:
            raw, label, valid = load_labels(p_target, p_geometry, b, z, y, x, inside, C)
            wanted = inside & ~is_ignored(raw, p_geometry)
            counts = wanted & valid
            bad = tl.sum((wanted & ~valid).to(tl.int32), axis=0)
            tl.store(p_rows + px, tl.where(counts, label, -1).to(ACC))
        flat = tl.where(counts, 1.0, 0.0).to(ACC)
        weight = flat
        if WEIGHTED:
            p_pixels = p_weight + offset_of(p_geometry + WEIGHT, b, z, y, x)
            weight = tl.load(p_pixels, mask=counts, other=0).to(ACC)
        tl.store(p_rows + T + px, weight)
        tl.store(p_rows + 2 * T + px, tl.where(tl.load(p_geometry + WEIGHTED_CE) != 0, weight, flat))
    else:
        bad = stage_labels(p_target, p_geometry, p_rows, b, tile_z, tile_y, tile_x, C, T, TZ, TY, TX, ACC)
    return bad


@triton.jit
def target_of(p_target, p_factors, label, c, C, T: tl.constexpr, DENSE: tl.constexpr, MANY: tl.constexpr):
    """y_c and its share t_c = a_c y_c + b_c in cross-entropy, at the pixels of `label`; both 0 for classes past C.

    p_target: the first row of the target, at the pixels. p_factors: a and b, [2, C].
    """
    here = below(True, c, C, MANY)
    if DENSE:
        y = tl.load(p_target + (3 + c) * T, mask=below(label == label, c, C, MANY), other=0.0)
    else:
        y = (label == c).to(label.dtype)
    a = tl.load(p_factors + c, mask=here, other=0.0)
    b = tl.load(p_factors + C + c, mask=here, other=0.0)
    return y, a * y + b
