"""Where a tile lies in the image, and which native pixels an output pixel reads."""

import triton
import triton.language as tl

# One row of integers describes the image, then one each scale; tables.geometry writes them.
TARGET_FIELDS = (
    *("label_b", "label_z", "label_y", "label_x", "label_c"),  # strides of the target; that over classes if dense
    *("weight_b", "weight_z", "weight_y", "weight_x"),  # strides of the weights of pixels
    *("ignores", "ignored"),  # whether there is a label to ignore, and which
    "weighted_ce",  # whether the weights of pixels count in cross-entropy too
)
IMAGE_FIELDS = ("full_z", "full_y", "full_x", "tiles_z", "tiles_y", "tiles_x", *TARGET_FIELDS)
SCALE_FIELDS = (
    *("native_z", "native_y", "native_x"),
    *("stride_b", "stride_c", "stride_z", "stride_y", "stride_x"),
    *("grad_b", "grad_c", "grad_z", "grad_y", "grad_x"),  # strides of the gradient
    *("reach_z", "reach_y", "reach_x"),  # native pixels that a tile can touch, along each axis
    *("near_z", "near_y", "near_x"),  # tiles that can touch a native pixel, along each axis
    "same",  # native size is the full size: nothing to interpolate
    "used",  # enters a map
    "partial",  # where the gradients of its tiles begin
)
FIELDS = 24  # integers a row, of both kinds

FULL = tl.constexpr(IMAGE_FIELDS.index("full_z"))
TILES = tl.constexpr(IMAGE_FIELDS.index("tiles_z"))
LABEL = tl.constexpr(IMAGE_FIELDS.index("label_b"))
LABEL_CLASS = tl.constexpr(IMAGE_FIELDS.index("label_c"))
WEIGHT = tl.constexpr(IMAGE_FIELDS.index("weight_b"))
IGNORES = tl.constexpr(IMAGE_FIELDS.index("ignores"))
WEIGHTED_CE = tl.constexpr(IMAGE_FIELDS.index("weighted_ce"))
NATIVE = tl.constexpr(SCALE_FIELDS.index("native_z"))
STRIDE = tl.constexpr(SCALE_FIELDS.index("stride_b"))
GRAD = tl.constexpr(SCALE_FIELDS.index("grad_b"))
REACH = tl.constexpr(SCALE_FIELDS.index("reach_z"))
NEAR = tl.constexpr(SCALE_FIELDS.index("near_z"))
SAME = tl.constexpr(SCALE_FIELDS.index("same"))
USED = tl.constexpr(SCALE_FIELDS.index("used"))
PARTIAL = tl.constexpr(SCALE_FIELDS.index("partial"))
ROW = tl.constexpr(FIELDS)


@triton.jit
def pick(values, i):
    """values[i] for an i known only at run time."""
    out = values[0]
    for n in tl.static_range(1, len(values)):
        out = tl.where(i == n, values[n], out)
    return out


@triton.jit
def wide(number):
    """A number as int64, also where the interpreter has made a Python int of it."""
    return number * tl.full((), 1, tl.int64)


@triton.jit
def scale_row(p_geometry, i):
    """The row of scale i; row 0 is the image's."""
    return p_geometry + (i + 1) * ROW


@triton.jit
def size_of(p_row, field):
    """A size as int32; strides stay int64."""
    return tl.load(p_row + field).to(tl.int32)


@triton.jit
def sizes_of(p_row, field):
    """Three sizes in a row, along z, y and x."""
    return size_of(p_row, field), size_of(p_row, field + 1), size_of(p_row, field + 2)


@triton.jit
def offset_of(p_strides, b, z, y, x):
    """Offsets of pixels in a tensor whose strides over (B, z, y, x) lie at p_strides."""
    offset = b * tl.load(p_strides) + z * tl.load(p_strides + 1)
    return offset + (y * tl.load(p_strides + 2) + x * tl.load(p_strides + 3))


@triton.jit
def tile_origin(p_geometry, tile, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """First output pixel (z, y, x) of a tile."""
    tiles_y = size_of(p_geometry, TILES + 1)
    tiles_x = size_of(p_geometry, TILES + 2)
    rest = tile // tiles_x
    return rest // tiles_y * TZ, rest % tiles_y * TY, tile % tiles_x * TX


@triton.jit
def source(out, full, native, ACC: tl.constexpr, WIDE: tl.constexpr):
    """What output coordinates `out` read: the lower native neighbour, the upper one, and the weight of the upper.

    Where the upper one has no weight it is not read, be it infinite: both are then the lower one, each half of it.
    (out + 1/2) native / full - 1/2 as a fraction of integers, so that it is exact: two kernels never disagree on a
    neighbour. WIDE is for axes so long that the numerator leaves int32.
    """
    if WIDE:
        out = out.to(tl.int64)
        full = full.to(tl.int64)
        native = native.to(tl.int64)
    numerator = tl.maximum((2 * out + 1) * native - full, 0)
    low = tl.minimum(numerator // (2 * full), native - 1)
    rest = numerator - low * (2 * full)
    alone = (rest == 0) | (low == native - 1)
    weight = tl.where(alone, 0.5, rest.to(ACC) / (2 * full).to(ACC))
    high = tl.where(alone, low, low + 1)
    return low.to(tl.int32), high.to(tl.int32), weight
