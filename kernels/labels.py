"""Labels: those of a tile as class numbers, and which samples have one that is no class."""

import triton
import triton.language as tl

from .maps import both
from .pixels import FULL, IGNORES, LABEL, offset_of, size_of, sizes_of, wide
from .stage import coordinates


@triton.jit
def is_ignored(raw, p_geometry):
    """Where values of the target are the label to ignore, if there is one; compared in their own type, as by torch."""
    if raw.dtype == tl.bfloat16:
        raw = raw.to(tl.float32)  # Triton's interpreter compares the bits of this type as whole numbers
    ignored = tl.load(p_geometry + IGNORES + 1).to(raw.dtype)
    return both(raw == ignored, tl.load(p_geometry + IGNORES) != 0)


@triton.jit
def load_labels(p_target, p_geometry, b, z, y, x, inside, C):
    """Labels as they are, as int32, and whether each is a class: a whole number in [0, C)."""
    raw = tl.load(p_target + offset_of(p_geometry + LABEL, b, z, y, x), mask=inside, other=0)
    label = raw.to(tl.int32)
    # Compared in its own type first: a 64-bit label may look valid once it is cut to 32 bits.
    return raw, label, (raw >= 0) & (raw < C) & (label.to(raw.dtype) == raw)


@triton.jit
def stage_labels(
    p_target,
    p_geometry,
    p_row,
    b,
    tile_z,
    tile_y,
    tile_x,
    C,
    T: tl.constexpr,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    ACC: tl.constexpr,
):
    """Fill one row [T] with class numbers; -1 past the border and where the label is no class.

    Returns how many pixels of the tile have a label that is no class.
    """
    px, z, y, x = coordinates(0, TZ, TY, TX, T)
    z, y, x = tile_z + z, tile_y + y, tile_x + x
    full_z, full_y, full_x = sizes_of(p_geometry, FULL)
    inside = (z < full_z) & (y < full_y) & (x < full_x)
    _, label, valid = load_labels(p_target, p_geometry, b, z, y, x, inside, C)
    tl.store(p_row + px, tl.where(inside & valid, label, -1).to(ACC))
    return tl.sum((inside & ~valid).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["C", "pixels", "blocks"])
def bad_labels_kernel(
    p_target,
    p_geometry,  # int64 [1 + L, FIELDS]
    p_bad,  # int32 [B], zeros at first; 1 where a label is no class
    C,
    pixels,  # of a sample
    blocks,  # of BLOCK pixels each, of a sample
    GENERAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the samples with a label that is no class, nor ignored. Grid: (B * blocks)."""
    b = wide(tl.program_id(0) // blocks)
    full_y = size_of(p_geometry, FULL + 1)
    full_x = size_of(p_geometry, FULL + 2)
    px = wide(tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = px < pixels
    raw, _, valid = load_labels(
        p_target, p_geometry, b, px // full_x // full_y, px // full_x % full_y, px % full_x, inside, C
    )  # fmt: skip
    if GENERAL:
        valid = valid | is_ignored(raw, p_geometry)
    # Whole numbers, so the order of the programs does not show.
    tl.atomic_max(p_bad + b, tl.max((inside & ~valid).to(tl.int32), axis=0))
