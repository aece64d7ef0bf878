"""What kernels read from memory instead of taking hundreds of arguments: maps of a plan, sizes and strides.

All tables are kept for the next call, so a training step copies none to the device; a new one goes through pinned
memory, which makes the host wait for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from ..plan import MAX_SCALES
from .maps import MEMBERS_AT, OPERATORS, TABLE_ROW
from .pixels import FIELDS, IMAGE_FIELDS, SCALE_FIELDS

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


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what `make` returns for the next call with the same arguments on the same stream of the device.

    The last argument is the device. Another stream gets a table of its own: nothing orders it after the copy that
    filled this one.
    """
    cached = lru_cache(maxsize=1024)(lambda stream, *arguments: make(*arguments))

    @wraps(make)
    def kept(*arguments: Any) -> Any:
        device = arguments[-1]
        return cached(torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, *arguments)

    return kept


def _on(device: torch.device, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    table = torch.tensor(rows, dtype=dtype)
    if device.type == "cpu":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured with sizes, strides or maps that this stream has not seen; run a step with "
            "them before capturing"
        )
    return table.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class ForwardTables:
    """groups int32 [groups, 2]: operator, largest size; maps int32 [groups * rows, TABLE_ROW]."""

    groups: Tensor
    maps: Tensor


@_kept
def forward_tables(encoded: tuple[int, ...], rows: int, device: torch.device) -> ForwardTables:
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
    return ForwardTables(_on(device, groups, torch.int32), _on(device, table, torch.int32))


@_kept
def backward_table(encoded: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [subsets, TABLE_ROW]: each set of members that makes a map, and the numbers of its maps or -1."""
    maps = decode(encoded)
    found: dict[tuple[int, ...], list[int]] = {}
    for n, one in enumerate(maps):
        found.setdefault(one.members, [-1] * len(OPERATORS))[one.operator] = n
    first = {one.members: one for one in reversed(maps)}
    return _on(device, [_row(first[members], numbers) for members, numbers in found.items()], torch.int32)


@_kept
def cat_pairs(encoded: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Subsets of which a `cat` map is made, and the first pair of each; int64."""
    cat = [one for one in decode(encoded) if OPERATORS[one.operator] == "cat"]
    rows = [[one.subset for one in cat], [one.first_pair for one in cat]]
    subsets, pairs = _on(device, rows, torch.int64)
    return subsets, pairs


@dataclass(frozen=True)
class Geometry:
    """Sizes of one problem under one shape of tile.

    Attributes:
        table: int64 [1 + L, FIELDS] on the device, see pixels.py.
        tiles: tiles of a sample.
        partial: numbers that the gradients of all tiles take at native resolution.
        room: numbers a class that a tile needs between the axes of the adjoint.
        most: elements of the largest gradient that has to be gathered.
        wide: whether sizes are so large that positions need int64.
    """

    table: Tensor
    tiles: int
    partial: int
    room: int
    most: int
    wide: bool


def source(out: int, full: int, native: int) -> tuple[int, int]:
    """Lower and upper native neighbour of an output coordinate; the kernels' own `pixels.source` in Python."""
    low = min(max((2 * out + 1) * native - full, 0) // (2 * full), native - 1)
    return low, min(low + 1, native - 1)


def _reach(full: int, native: int, tile: int) -> int:
    """The most native pixels that a tile touches along an axis."""
    starts = range(0, full, tile)
    return max(source(min(s + tile, full) - 1, full, native)[1] - source(s, full, native)[0] + 1 for s in starts)


def _near(full: int, native: int, tile: int) -> int:
    """As many tiles, from the first on, as can touch a native pixel along an axis."""
    return min(-(-full // tile), 2 * full // (native * tile) + 3)


@_kept
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
    device: torch.device,
) -> Geometry:
    """Describe a problem to the kernels.

    Args:
        full, native: size of the labels, and of each scale.
        tile: output pixels of a tile.
        strides, grad_strides: of each scale and of its gradient, over (B, C, z, y, x).
        target: what the kernels need to know of the target, TARGET_FIELDS of pixels.py.
        used: whether each scale enters a map.
        batch, classes: B, C.
        device: where the table goes.
    """
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
    assert len(rows[0]) == len(IMAGE_FIELDS) and len(rows[1]) == len(SCALE_FIELDS)
    filled = [row + [0] * (FIELDS - len(row)) for row in rows]
    # (2 out + 1) native - full and (2 n + 1) full must stay in int32.
    wide = any((2 * f + 1) * (n + 1) + 2 * n * f >= 2**31 for size in native for f, n in zip(full, size, strict=True))
    return Geometry(_on(device, filled, torch.int64), tiles, partial, room, most, wide)
