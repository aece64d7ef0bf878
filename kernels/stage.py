"""The logits of a tile, interpolated once into the program's scratch."""

import triton
import triton.language as tl

from .pixels import FULL, NATIVE, SAME, STRIDE, USED, pick, scale_row, size_of, sizes_of, source


@triton.jit
def coordinates(q, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [BLOCK] in a tile from q on, and their (z, y, x) in it."""
    px = q + tl.arange(0, BLOCK)
    return px, px // (TY * TX), px // TX % TY, px % TX


@triton.jit
def stage_logits(
    logits,
    p_geometry,
    p_rows,
    b,
    tile_z,
    tile_y,
    tile_x,
    C,
    L,
    T: tl.constexpr,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Fill rows [L, C, T] with the interpolated logits of one tile of sample b.

    Pixels past the border repeat the last one: whoever reads them gives them no weight.
    """
    full_z, full_y, full_x = sizes_of(p_geometry, FULL)
    for i in tl.range(L, disable_licm=True):
        p_scale = scale_row(p_geometry, i)
        if tl.load(p_scale + USED) != 0:
            p_z = pick(logits, i) + b * tl.load(p_scale + STRIDE)
            stride_c = tl.load(p_scale + STRIDE + 1)
            stride_z = tl.load(p_scale + STRIDE + 2)
            stride_y = tl.load(p_scale + STRIDE + 3)
            stride_x = tl.load(p_scale + STRIDE + 4)
            for q in range(0, T, BLOCK):
                px, z, y, x = coordinates(q, TZ, TY, TX, BLOCK)
                y = tl.minimum(tile_y + y, full_y - 1)
                x = tl.minimum(tile_x + x, full_x - 1)
                y0, y1, wy = source(y, full_y, size_of(p_scale, NATIVE + 1), ACC, WIDE)
                x0, x1, wx = source(x, full_x, size_of(p_scale, NATIVE + 2), ACC, WIDE)
                o_y0, o_y1 = y0 * stride_y, y1 * stride_y  # [BLOCK] int64, as strides are
                o_x0, o_x1 = x0 * stride_x, x1 * stride_x
                z = tl.minimum(tile_z + z, full_z - 1)
                z0, z1, wz = source(z, full_z, size_of(p_scale, NATIVE), ACC, WIDE)
                o_z0, o_z1 = z0 * stride_z, z1 * stride_z
                same = tl.load(p_scale + SAME) != 0
                for c in range(C):
                    p_c = p_z + c * stride_c
                    p_out = p_rows + (i * C + c) * T + px
                    if same:
                        tl.store(p_out, tl.load(p_c + o_z0 + o_y0 + o_x0).to(ACC))
                    else:
                        value = _blend(p_c + o_z0, o_y0, o_y1, o_x0, o_x1, wy, wx, ACC)
                        if DIMS == 3:
                            above = _blend(p_c + o_z1, o_y0, o_y1, o_x0, o_x1, wy, wx, ACC)
                            value = (1 - wz) * value + wz * above
                        tl.store(p_out, value)


@triton.jit
def _blend(p_plane, o_y0, o_y1, o_x0, o_x1, wy, wx, ACC: tl.constexpr):
    """Bilinear interpolation in one plane: along x in two rows, then between them."""
    upper = (1 - wx) * tl.load(p_plane + o_y0 + o_x0).to(ACC) + wx * tl.load(p_plane + o_y0 + o_x1).to(ACC)
    lower = (1 - wx) * tl.load(p_plane + o_y1 + o_x0).to(ACC) + wx * tl.load(p_plane + o_y1 + o_x1).to(ACC)
    return (1 - wy) * upper + wy * lower
