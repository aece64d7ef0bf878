"""Gradients of a tile taken back from full to native resolution, and what the tiles have in common summed.

Nothing is added to memory by two programs at once: each tile writes what it touches to a place of its own, and a
second kernel gathers it for each native pixel in the order of the tiles. The same inputs give the same bits.
"""

import triton
import triton.language as tl

from .pixels import (
    FULL,
    GRAD,
    NATIVE,
    NEAR,
    PARTIAL,
    REACH,
    ROW,
    SAME,
    TILES,
    USED,
    pick,
    scale_row,
    size_of,
    sizes_of,
    source,
    wide,
)
from .stage import coordinates


@triton.jit
def _contract(
    p_in, p_out, zero, outer, inner, reach, origin, full, native, N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adjoint of the interpolation along one axis of a tile: [outer, N, inner] -> [outer, reach, inner].

    A matrix product with the N x reach interpolation weights. origin: output coordinate where the tile begins.
    """
    STEP: tl.constexpr = 16 if N < 16 else N  # the least that matrix units take
    BM: tl.constexpr = 16 if N > 32 else 32
    lowest, _, _ = source(origin, full, native, ACC, WIDE)
    k = zero + tl.arange(0, STEP)
    out = origin + k
    low, high, weight = source(out, full, native, ACC, WIDE)  # [STEP]
    inside = (k < N) & (out < full)
    for f0 in range(0, reach, 16):
        f = f0 + zero + tl.arange(0, 16)
        here = (lowest + f)[None, :]
        right = tl.where(low[:, None] == here, (1 - weight)[:, None], 0.0)
        right += tl.where(high[:, None] == here, weight[:, None], 0.0)
        right = tl.where(inside[:, None], right, 0.0)  # [STEP, 16]
        for m0 in range(0, outer * inner, BM):
            m = m0 + zero + tl.arange(0, BM)
            a, e = m // inner, m % inner
            p_left = p_in + (a * (N * inner) + e)[:, None] + (k * inner)[None, :]
            left = tl.load(p_left, mask=(m < outer * inner)[:, None] & (k < N)[None, :], other=0.0)  # [BM, STEP]
            product = tl.dot(left, right, input_precision=DOT, out_dtype=ACC)
            p_to = p_out + (a * (reach * inner) + e)[:, None] + (f * inner)[None, :]
            tl.store(p_to, product, mask=(m < outer * inner)[:, None] & (f < reach)[None, :])


@triton.jit
def tile_gradients(
    p_grads, p_room, grads, p_geometry, p_partial, b, tile, tiles, tile_z, tile_y, tile_x, C, L,
    T: tl.constexpr, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take the gradients [L, C, T] of a tile to native resolution.

    A scale at full size is finished here, in its own gradient. For the others the native pixels that the tile can
    touch go to p_partial: [B, tiles, C, reach_z, reach_y, reach_x] from the scale's place on. p_room holds what is
    between the axes.
    """
    full_z, full_y, full_x = sizes_of(p_geometry, FULL)
    for i in tl.range(L, disable_licm=True):
        p_scale = scale_row(p_geometry, i)
        p_own = p_grads + i * (C * T)
        used = tl.load(p_scale + USED) != 0
        same = tl.load(p_scale + SAME) != 0
        if used & same:
            for q in range(0, T, BLOCK):
                px, z, y, x = coordinates(q, TZ, TY, TX, BLOCK)
                z, y, x = tile_z + z, tile_y + y, tile_x + x
                inside = (z < full_z) & (y < full_y) & (x < full_x)
                p_out = pick(grads, i) + b * tl.load(p_scale + GRAD)
                p_out += z * tl.load(p_scale + GRAD + 2) + y * tl.load(p_scale + GRAD + 3)
                p_out += x * tl.load(p_scale + GRAD + 4)
                for c in range(C):
                    value = tl.load(p_own + c * T + px)
                    p_c = p_out + c * tl.load(p_scale + GRAD + 1)
                    tl.store(p_c, value.to(p_c.dtype.element_ty), mask=inside)
        if used & (tl.load(p_scale + SAME) == 0):
            native_z, native_y, native_x = sizes_of(p_scale, NATIVE)
            reach_z, reach_y, reach_x = sizes_of(p_scale, REACH)
            zero = size_of(p_scale, ROW - 1)
            cells = reach_z * reach_y * reach_x
            p_out = p_partial + tl.load(p_scale + PARTIAL) + (b * tiles + tile) * C * cells
            _contract(p_own, p_room, zero, C * (TZ * TY), 1, reach_x, tile_x, full_x, native_x, TX, DOT, ACC, WIDE)
            tl.debug_barrier()
            if DIMS == 3:
                p_next = p_room + C * (TZ * TY) * reach_x
                _contract(p_room, p_next, zero, C * TZ, reach_x, reach_y, tile_y, full_y, native_y, TY, DOT, ACC, WIDE)
                tl.debug_barrier()
                _contract(
                    p_next, p_out, zero, C, reach_y * reach_x, reach_z, tile_z, full_z, native_z, TZ, DOT, ACC, WIDE
                )
            else:
                _contract(p_room, p_out, zero, C, reach_x, reach_y, tile_y, full_y, native_y, TY, DOT, ACC, WIDE)
            tl.debug_barrier()


@triton.jit
def _first_tile(n, full, native, N: tl.constexpr, WIDE: tl.constexpr):
    """The first tile of N output pixels that can touch native coordinate n."""
    if WIDE:
        n = n.to(tl.int64)
        full = full.to(tl.int64)
        native = native.to(tl.int64)
    return (tl.maximum((2 * n - 1) * full - native, 0) // (2 * native) // N).to(tl.int32)


@triton.jit
def _place(tile, tiles, n, full, native, reach, N: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """Where native coordinate n lies among those that a tile touches, and whether it does."""
    lowest, _, _ = source(tile * N, full, native, ACC, WIDE)
    place = n - lowest
    return place, (tile < tiles) & (place >= 0) & (place < reach)


RUN_TIME = ["C", "batch", "tiles"]


@triton.jit(do_not_specialize=RUN_TIME)
def gather_kernel(
    p_partial,  # as tile_gradients wrote them
    grads,  # MAX_SCALES pointers to gradients [B, C, *native]
    p_geometry,  # int64 [1 + L, FIELDS]
    C,
    batch,
    tiles,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sum the tiles' gradients for BLOCK native elements of one scale. Grid: (blocks, L)."""
    i = tl.program_id(1)
    p_scale = scale_row(p_geometry, i)
    native_z, native_y, native_x = sizes_of(p_scale, NATIVE)
    wanted = (tl.load(p_scale + USED) != 0) & (tl.load(p_scale + SAME) == 0)
    count = wide(native_z) * native_y * native_x * C * batch
    start = wide(tl.program_id(0)) * BLOCK
    if wanted & (start < count):
        full_z, full_y, full_x = sizes_of(p_geometry, FULL)
        tiles_z, tiles_y, tiles_x = sizes_of(p_geometry, TILES)
        reach_z, reach_y, reach_x = sizes_of(p_scale, REACH)
        e = start + tl.arange(0, BLOCK)
        known = e < count
        e = tl.minimum(e, count - 1)
        x = (e % native_x).to(tl.int32)
        y = (e // native_x % native_y).to(tl.int32)
        z = (e // native_x // native_y % native_z).to(tl.int32)
        channel = e // native_x // native_y // native_z  # b * C + c
        b, c = channel // C, channel % C
        first_z = _first_tile(z, full_z, native_z, TZ, WIDE)
        first_y = _first_tile(y, full_y, native_y, TY, WIDE)
        first_x = _first_tile(x, full_x, native_x, TX, WIDE)
        total = tl.zeros((BLOCK,), ACC)
        for dz in range(tl.load(p_scale + NEAR).to(tl.int32)):
            place_z, on_z = _place(first_z + dz, tiles_z, z, full_z, native_z, reach_z, TZ, ACC, WIDE)
            for dy in range(tl.load(p_scale + NEAR + 1).to(tl.int32)):
                place_y, on_y = _place(first_y + dy, tiles_y, y, full_y, native_y, reach_y, TY, ACC, WIDE)
                for dx in range(tl.load(p_scale + NEAR + 2).to(tl.int32)):
                    place_x, on_x = _place(first_x + dx, tiles_x, x, full_x, native_x, reach_x, TX, ACC, WIDE)
                    tile = ((first_z + dz) * tiles_y + first_y + dy) * tiles_x + first_x + dx
                    cell = ((b * tiles + tile) * C + c) * (reach_z * reach_y * reach_x)
                    cell += (place_z * reach_y + place_y) * reach_x + place_x
                    p_cell = p_partial + tl.load(p_scale + PARTIAL) + cell
                    total += tl.load(p_cell, mask=known & on_z & on_y & on_x, other=0.0)
        p_out = pick(grads, i) + b * tl.load(p_scale + GRAD) + c * tl.load(p_scale + GRAD + 1)
        p_out += z * tl.load(p_scale + GRAD + 2) + y * tl.load(p_scale + GRAD + 3) + x * tl.load(p_scale + GRAD + 4)
        tl.store(p_out, total.to(p_out.dtype.element_ty), mask=known)
