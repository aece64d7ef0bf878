"""What kernels read from memory instead of taking hundreds of arguments: maps of a plan, sizes and strides.

Only host tables are kept for the next call. Each pass copies all that it reads, at once, into fresh memory of the
device on the current stream: right on any stream and in any memory pool, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..plan import MAX_SCALES
from .maps import MEMBERS_AT, OPERATORS, TABLE_ROW
from .pixels import FIELDS, IMAGE_FIELDS, SCALE_FIELDS

MOST_PIXELS = 2**29  # axes are shorter; kMostPixels in csrc/inputs.h
Size = tuple[int, int, int]  # along z, y, x; axes that are not there have size 1
# Codes in a plan's list of maps: 0 a scale by itself, then the operators. A scale by itself is a sum of one.
_ORIGINAL = 0


@dataclass(frozen=True)
class Map:
    """One supervised map as the plan lists it: operator (index into OPERATORS), members, subset, first pair."""

    operator: int
    members: tuple[int, ...]
    subset: int
    first_pair: int


def decode(encoded: Sequence[int]) -> list[Map]:
    """Maps from the four integers each that `MixPlan.encoded` holds: code, bit mask of members, subset, first pair."""
    maps = []
    for at in range(0, len(encoded), 4):
        code, mask, subset, first_pair = encoded[at : at + 4]
        members = tuple(i for i in range(MAX_SCALES) if mask >> i & 1)
        maps.append(Map(0 if code == _ORIGINAL else code - 1, members, max(subset, 0), max(first_pair, 0)))
    return maps


def _row(one: Map, numbers: Sequence[int]) -> list[int]:
    row = [len(one.members), one.first_pair, one.subset, *numbers]
    row += [0] * (MEMBERS_AT - len(row)) + list(one.members)
    return row + [0] * (TABLE_ROW - len(row))


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of this device, which need not be the current device, is capturing a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Host:
    """Tables of one pass in host memory, one after the other.

    Attributes:
        words: int64, all tables; each begins at a multiple of 16 bytes, which kernels are compiled for.
        parts: of each table the type, rows, columns, and the word where it begins.
    """

    words: Tensor
    parts: tuple[tuple[torch.dtype, int, int, int], ...]

    def split(self, words: Tensor) -> tuple[Tensor, ...]:
        """The tables [rows, columns] in a copy of `words`; views."""
        return tuple(
            words[start:].view(dtype)[: rows * columns].view(rows, columns)
            for dtype, rows, columns, start in self.parts
        )


def _pack(tables: Sequence[tuple[torch.dtype, Sequence[Sequence[int]]]], is_pinned: bool) -> Host:
    """Put tables together, in page-locked memory if asked for."""
    pieces, parts, start = [], [], 0
    for dtype, rows in tables:
        numbers = [number for row in rows for number in row]
        each = 16 // dtype.itemsize
        padded = numbers + [0] * (-len(numbers) % each)
        pieces.append(torch.tensor(padded, dtype=dtype, device="cpu").view(torch.int64))
        parts.append((dtype, len(rows), len(rows[0]) if rows else 0, start))
        start += pieces[-1].numel()
    words = torch.cat(pieces)
    return Host(words.pin_memory() if is_pinned else words, tuple(parts))


def _copied(host: Host, device: torch.device, is_captured: bool) -> tuple[Tensor, ...]:
    """The tables on the device, in memory of this call's own (on a CPU, where nothing writes to them, as they are).

    A captured copy would read the host's memory again at every replay, which would have to stay as it is for as long
    as the process lives. So while a graph is captured, numbers go as arguments of kernels, which the graph keeps
    itself; one kernel writes about a hundred. No page-locked memory is needed then, which torch before 2.11 cannot
    allocate during a capture.
    """
    if device.type == "cpu":
        return host.split(host.words)
    if not is_captured:
        return host.split(torch.empty_like(host.words, device=device).copy_(host.words, non_blocking=True))
    words = torch.zeros_like(host.words, device=device)
    filled = [(word, number) for word, number in zip(words.unbind(), host.words.tolist(), strict=True) if number]
    torch._foreach_add_([word for word, _ in filled], [number for _, number in filled])
    return host.split(words)


def _forward_rows(encoded: tuple[int, ...], rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """The maps in groups of `rows` of the same operator; a group that is not full ends with maps of size 0."""
    maps = decode(encoded)
    groups, table = [], []
    for operator in range(len(OPERATORS)):
        numbers = [n for n, one in enumerate(maps) if one.operator == operator]
        numbers.sort(key=lambda n: len(maps[n].members))  # a group takes as long as its largest
        for at in range(0, len(numbers), rows):
            group = numbers[at : at + rows]
            groups.append([operator, max(len(maps[n].members) for n in group)])
            table += [_row(maps[n], [n]) for n in group]
            table += [_row(Map(operator, (), 0, 0), [-1])] * (rows - len(group))
    return groups, table


def _backward_rows(encoded: tuple[int, ...]) -> list[list[int]]:
    maps = decode(encoded)
    found: dict[tuple[int, ...], list[int]] = {}
    for n, one in enumerate(maps):
        found.setdefault(one.members, [-1] * len(OPERATORS))[one.operator] = n
    first = {one.members: one for one in reversed(maps)}
    return [_row(first[members], numbers) for members, numbers in found.items()]


@dataclass(frozen=True)
class Geometry:
    """Sizes of one problem under one shape of tile.

    Attributes:
        rows: [1 + L][FIELDS], see pixels.py.
        tiles: tiles of a sample.
        partial: numbers that the gradients of all tiles take at native resolution.
        room: numbers a class that a tile needs between the axes of the adjoint.
        most: elements of the largest gradient that has to be gathered.
        wide: whether sizes are so large that positions need int64.
    """

    rows: tuple[tuple[int, ...], ...]
    tiles: int
    partial: int
    room: int
    most: int
    wide: bool


def source(out: int, full: int, native: int) -> tuple[int, int]:
    """Lower and upper native neighbour of an output coordinate; the kernels' own `pixels.source` in Python."""
    low, rest = divmod(max((2 * out + 1) * native - full, 0), 2 * full)
    return (low, low + (rest > 0)) if low < native - 1 else (native - 1, native - 1)


def _reach(full: int, native: int, tile: int) -> int:
    """The most native pixels that a tile touches along an axis."""
    starts = range(0, full, tile)
    return max(source(min(s + tile, full) - 1, full, native)[1] - source(s, full, native)[0] + 1 for s in starts)


def _near(full: int, native: int, tile: int) -> int:
    """As many tiles, from the first on, as can touch a native pixel along an axis."""
    return min(-(-full // tile), 2 * full // (native * tile) + 3)


@lru_cache(maxsize=1024)
def geometry(
    full: Size,
    native: tuple[Size, ...],
    tile: Size,
    strides: tuple[tuple[int, ...], ...],
    grad_strides: tuple[tuple[int, ...], ...],
    target: tuple[int, ...],
    used: tuple[bool, ...],
    batch: int,
    classes: int,
) -> Geometry:
    """Describe a problem to the kernels.

    Args:
        full, native: size of the labels, and of each scale.
        tile: output pixels of a tile.
        strides, grad_strides: of each scale and of its gradient, over (B, C, z, y, x).
        target: what the kernels need to know of the target, TARGET_FIELDS of pixels.py.
        used: whether each scale enters a map.
        batch, classes: B, C.

    Raises:
        ValueError: a size that the kernels, which count in 32 bits, cannot work with.
    """
    longest = max(*full, *(n for size in native for n in size))
    if longest >= MOST_PIXELS:
        raise ValueError(
            f"logits or target: got {longest} pixels along an axis, expected less than {MOST_PIXELS}; cut it into "
            "parts, or use impl='eager'"
        )
    counts = [-(-n // t) for n, t in zip(full, tile, strict=True)]
    tiles = counts[0] * counts[1] * counts[2]
    rows: list[list[int]] = [[*full, *counts, *target]]
    partial, room, most = 0, 0, 0
    for i, size in enumerate(native):
        same = size == full
        reach = [_reach(f, n, t) for f, n, t in zip(full, size, tile, strict=True)]
        near = [_near(f, n, t) for f, n, t in zip(full, size, tile, strict=True)]
        rows.append([*size, *strides[i], *grad_strides[i], *reach, *near, int(same), int(used[i]), partial])
        if used[i] and not same:
            partial += batch * tiles * classes * reach[0] * reach[1] * reach[2]
            room = max(room, tile[0] * reach[2] * (tile[1] + reach[1]))
            most = max(most, batch * classes * size[0] * size[1] * size[2])
    if room * classes >= 2**31 or tiles >= 2**31:
        raise ValueError(
            f"logits: got native sizes {native} for a target of {full} pixels (z, y, x) and {classes} classes, "
            "expected sizes for which 2^31 tiles, and 2^31 numbers between the axes of one, suffice; use impl='eager'"
        )
    assert len(rows[0]) == len(IMAGE_FIELDS) and len(rows[1]) == len(SCALE_FIELDS)
    filled = tuple((*row, *[0] * (FIELDS - len(row))) for row in rows)
    # (2 out + 1) native - full and (2 n + 1) full must stay in int32.
    wide = any((2 * f + 1) * (n + 1) + 2 * n * f >= 2**31 for size in native for f, n in zip(full, size, strict=True))
    return Geometry(filled, tiles, partial, room, most, wide)


@dataclass(frozen=True)
class ForwardTables:
    """What the statistics read.

    Attributes:
        geometry: int64 [1 + L, FIELDS].
        groups: int32 [groups, 2]: operator, largest size.
        maps: int32 [groups * rows, TABLE_ROW].
    """

    geometry: Tensor
    groups: Tensor
    maps: Tensor


@dataclass(frozen=True)
class BackwardTables:
    """What the gradients read.

    Attributes:
        geometry: int64 [1 + L, FIELDS].
        sets: int32 [subsets, TABLE_ROW]: each set of members that makes a map, and the numbers of its maps or -1.
        cat: int64 [2, maps]: subsets of which a `cat` map is made, and the first pair of each.
    """

    geometry: Tensor
    sets: Tensor
    cat: Tensor


@lru_cache(maxsize=1024)
def _forward_host(encoded: tuple[int, ...], rows: int, shape: Geometry, is_pinned: bool) -> Host:
    groups, maps = _forward_rows(encoded, rows)
    return _pack([(torch.int64, shape.rows), (torch.int32, groups), (torch.int32, maps)], is_pinned)


@lru_cache(maxsize=1024)
def _backward_host(encoded: tuple[int, ...], shape: Geometry, is_pinned: bool) -> Host:
    cat = [one for one in decode(encoded) if OPERATORS[one.operator] == "cat"]
    pairs = [[one.subset for one in cat], [one.first_pair for one in cat]]
    return _pack([(torch.int64, shape.rows), (torch.int32, _backward_rows(encoded)), (torch.int64, pairs)], is_pinned)


def forward_tables(encoded: tuple[int, ...], rows: int, shape: Geometry, device: torch.device) -> ForwardTables:
    """What the statistics read, on the device: `encoded` of a MixPlan, `rows` maps of one operator a group."""
    is_captured = is_capturing(device)
    # Nothing is kept of a capture: page-locked memory that made room for it would be freed in its midst.
    make = _forward_host.__wrapped__ if is_captured else _forward_host
    host = make(encoded, rows, shape, device.type == "cuda" and not is_captured)
    return ForwardTables(*_copied(host, device, is_captured))


def backward_tables(encoded: tuple[int, ...], shape: Geometry, device: torch.device) -> BackwardTables:
    """What the gradients read, on the device: `encoded` of a MixPlan."""
    is_captured = is_capturing(device)
    make = _backward_host.__wrapped__ if is_captured else _backward_host
    host = make(encoded, shape, device.type == "cuda" and not is_captured)
    return BackwardTables(*_copied(host, device, is_captured))
