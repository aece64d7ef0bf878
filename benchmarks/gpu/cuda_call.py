"""One launch of a CUDA kernel made up on the CPU: the argument that csrc/cuda/prepare.cpp would pass, and arrays."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lomix_fast.plan import MixPlan

from .cuda_shapes import Shape, Tiles, call_layout, maps_of, pairs_of, shapes

_SCALES, _MAPS, _SUBSETS, _MIXES, _MIX_SHIFT, _NO_MAP = 8, 512, 255, 7, 12, 0xFFFF
_MIX = {"orig": 0, "add": 0, "mul": 1, "cat": 2, "awf": 3}
_COST = {0: 1, 1: 1, 2: 100, 3: 20}  # a member
_INT64_LABELS = 4
Floats = npt.NDArray[np.float32]


_BYTES, _SHORTS, _INTS, _LONGS, _AXES = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_int, ctypes.c_int64, ctypes.c_int * 3
# Members of the structures of csrc/cuda/call.h that a launch fills in; where they lie is asked of the header.
_MEMBERS: dict[str, dict[str, type]] = {
    "Map": dict.fromkeys(("members", "first_pair", "number", "code"), _SHORTS),
    "Subset": {**dict.fromkeys(("members", "first_pair", "index"), _SHORTS), "number": _SHORTS * _MIXES},
    "Scale": {
        **dict.fromkeys(("logits", "grad"), ctypes.c_uint64),
        **{"stride": _LONGS * 5, "grad_stride": _LONGS * 5, "partial": _LONGS},
        **dict.fromkeys(("size", "reach", "near"), _AXES),
        **dict.fromkeys(("used", "same", "quads"), ctypes.c_bool),
    },
    "Tiling": {
        **dict.fromkeys(("log_size", "tiles"), _AXES),
        **dict.fromkeys(("strips", "per_sample", "chunks", "chunk_tiles", "items", "blocks"), _INTS),
    },
    "Call<float>": {
        **{"label_stride": _LONGS * 4, "scratch_size": _LONGS, "full": _AXES},
        **dict.fromkeys(("labels", "weight", "bias", "score", "score_bias", "scratch"), ctypes.c_uint64),
        **dict.fromkeys(("partial", "counts", "grad_stats", "bad", "native_partial", "products"), ctypes.c_uint64),
        **dict.fromkeys(("batch", "num_scales", "num_classes", "num_maps", "num_subsets", "num_pairs"), _INTS),
        **dict.fromkeys(("padded", "logit_type", "label_type", "warp_sums"), _INTS),
        **dict.fromkeys(("squared", "learned", "room_in_shared"), ctypes.c_bool),
    },
}


@cache
def call_type() -> type[ctypes.Structure]:
    """`lomix::cuda::Call<float>` as the header lays it out; members that a launch need not know are zeros.

    Raises:
        RuntimeError: a member is gone.
    """
    members = {name: dict(known) for name, known in _MEMBERS.items()}
    parts = {"tiling": "Tiling", "scales": "Scale", "maps": "Map", "subsets": "Subset"}
    names = [name if field is None else f"{name}::{field}" for name in members for field in (None, *members[name])]
    layout = call_layout((*names, *(f"Call<float>::{field}" for field in parts)))
    made: dict[str, type[ctypes.Structure]] = {}
    counts = {"tiling": 1, "scales": _SCALES, "maps": _MAPS, "subsets": _SUBSETS}
    for name, known in members.items():
        if name == "Call<float>":
            known |= {f: made[kind] if counts[f] == 1 else made[kind] * counts[f] for f, kind in parts.items()}
        fields, end = [], 0
        for offset, field in sorted((layout[f"{name}::{field}"], field) for field in known):
            fields += [(f"gap_{offset}", _BYTES * (offset - end)), (field, known[field])]
            end = offset + ctypes.sizeof(known[field])
        fields.append(("gap", _BYTES * (layout[name] - end)))
        made[name] = type(name, (ctypes.Structure,), {"_pack_": 1, "_fields_": fields})
    return made["Call<float>"]


@dataclass(frozen=True)
class Inputs:
    """One sample: logits [C, z, y, x] of each scale, labels [z, y, x], W, b, u and v as `map_stats` takes them."""

    logits: list[Floats]
    labels: npt.NDArray[np.int64]
    parameters: tuple[Floats, Floats, Floats, Floats]

    @property
    def full(self) -> tuple[int, int, int]:
        """Pixels along z, y, x."""
        z, y, x = self.labels.shape
        return z, y, x


def make_inputs(classes: int, full: tuple[int, int, int], ratios: tuple[int, ...], seed: int = 0) -> Inputs:
    """Numbers drawn at random.

    Args:
        classes: C.
        full: pixels along z, y, x.
        ratios: full over native size of each scale, the coarsest first; axes of one pixel stay.
        seed: of the numbers.
    """
    rng, scales = np.random.default_rng(seed), len(ratios)
    pairs, subsets = pairs_of(scales), (maps_of(scales) - scales) // 4

    def normal(*shape: int) -> Floats:
        return rng.standard_normal(shape).astype(np.float32)

    logits = [normal(classes, *(-(-n // ratio) for n in full)) for ratio in ratios]
    parameters = (
        0.3 * normal(pairs, classes, classes),
        normal(subsets, classes),
        normal(pairs, classes),
        normal(pairs),
    )
    return Inputs(logits, rng.integers(0, classes, full), parameters)


def fit_tiles(tiles: Tiles, full: tuple[int, int, int], chunk_tiles: int) -> Tiles:
    """The same tiles on another image, so many to an item, and a block for each item."""
    counts = tuple(-(-n // size) for n, size in zip(full, tiles.sizes, strict=True))
    chunks = -(-math.prod(counts) // chunk_tiles)
    return replace(tiles, counts=counts, chunks=chunks, chunk_tiles=chunk_tiles, items=chunks, blocks=chunks)


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        which: "forward" or "backward".
        call: the argument, a `call_type`; its addresses are still to be filled in.
        shape: threads and the like.
        tiles: sizes of the launch.
        arrays: what the addresses point to, by member: "labels", "scales.0.logits".
    """

    which: str
    call: Any
    shape: Shape
    tiles: Tiles
    arrays: dict[str, npt.NDArray[np.generic]]


def _padded(array: Floats, to: int) -> Floats:
    wide = np.zeros((*array.shape[:-1], to), np.float32)
    wide[..., : array.shape[-1]] = array
    return wide


def source_of(out: int, full: int, native: int) -> int:
    """Lower native coordinate that an output coordinate reads, as csrc/mix_math.h has it."""
    return min(max(0, (2 * out + 1) * native - full) // (2 * full), native - 1)


def reach_of(full: int, native: int, tile: int) -> int:
    """The most native pixels that a tile touches along an axis."""
    spans = [
        min(source_of(min(first + tile, full) - 1, full, native) + 1, native - 1) - source_of(first, full, native) + 1
        for first in range(0, full, tile)
    ]
    return max(1, *spans)


def make_launch(which: str, inputs: Inputs, tiles: Tiles, grad_stats: Floats | None = None) -> Launch:
    """One launch over one sample, with all maps of its scales.

    Args:
        which: "forward" or "backward".
        inputs: the sample.
        tiles: see `fit_tiles`.
        grad_stats: backward, [M, 1 + 2C].
    """
    classes, scales = len(inputs.logits[0]), len(inputs.logits)
    full, pairs, shape = inputs.full, pairs_of(scales), shapes()[which, classes, scales]
    side, padded = classes + 1, -(-classes // 4) * 4
    call = call_type()(
        batch=1, num_scales=scales, num_classes=classes, num_pairs=pairs, padded=padded, squared=True, learned=True
    )
    call.label_stride[:] = [0, full[1] * full[2], full[2], 1]
    call.warp_sums = shape.warp_sums
    call.label_type, call.full[:] = _INT64_LABELS, full
    weight, bias, score, score_bias = inputs.parameters
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "labels": inputs.labels,
        "weight": _padded(np.ascontiguousarray(weight.transpose(0, 2, 1)), padded),
        "bias": _padded(bias, padded),
        "score": _padded(score, padded),
        "score_bias": score_bias,
    }
    _fill_maps(call, scales)
    tiling = call.tiling
    tiling.log_size[:], tiling.tiles[:] = tiles.log_size, tiles.counts
    tiling.strips, tiling.per_sample, tiling.chunks = tiles.strips, tiles.per_sample, tiles.chunks
    tiling.chunk_tiles, tiling.items, tiling.blocks = tiles.chunk_tiles, tiles.items, tiles.blocks
    room, partial = 0, 0
    for i, logits in enumerate(inputs.logits):
        scale, size = call.scales[i], logits.shape[1:]
        same = size == full
        steps = [logits.size, math.prod(size), size[1] * size[2], size[2], 1]
        scale.stride[:], scale.grad_stride[:], scale.size[:] = steps, steps, size
        scale.used, scale.same = True, same
        scale.quads = same and all(step % 4 == 0 for step in steps[:4]) and tiles.log_size[2] >= 2
        scale.reach[:] = [reach_of(*one) for one in zip(full, size, tiles.sizes, strict=True)]
        scale.near[:] = [min(-(-f // t), 2 * f // (n * t) + 2) for f, n, t in zip(full, size, tiles.sizes, strict=True)]
        arrays[f"scales.{i}.logits"] = logits
        if which == "backward":
            arrays[f"scales.{i}.grad"] = np.zeros_like(logits)
            if not same:
                rz, ry, rx = scale.reach
                room = max(room, classes * tiles.sizes[0] * (tiles.sizes[1] + ry) * rx)
                scale.partial = partial
                partial += tiles.per_sample * classes * rz * ry * rx
    if which == "forward":
        arrays["partial"] = np.zeros((tiles.items, call.num_maps, 1 + 2 * classes), np.float32)
        arrays["counts"] = np.zeros((tiles.items, 1 + classes), np.int32)
    else:
        if grad_stats is None:
            grad_stats = np.random.default_rng(1).standard_normal((call.num_maps, 1 + 2 * classes)).astype(np.float32)
        call.room_in_shared = room <= shape.room
        call.scratch_size = 0 if call.room_in_shared else -(-room // 32) * 32
        arrays["grad_stats"], arrays["bad"] = grad_stats.astype(np.float32), np.zeros(1, np.int32)
        arrays["native_partial"] = np.zeros(partial, np.float32)
        arrays["products"] = np.zeros((tiles.blocks, pairs, side, side), np.float32)
        arrays["scratch"] = np.zeros(tiles.blocks * call.scratch_size, np.float32)
    return Launch(which, call, shape, tiles, arrays)


def _fill_maps(call: Any, scales: int) -> None:
    maps, subsets = [], {}
    for number, one in enumerate(MixPlan.create(scales).maps):
        members, mix = sum(1 << i for i in one.members), _MIX[one.operator]
        pair, index = max(one.first_pair, 0), max(one.subset, 0)
        maps.append((_COST[mix] * len(one.members), (members, pair, number, mix << _MIX_SHIFT | index)))
        entry = subsets.setdefault(members, (pair, index, [_NO_MAP] * _MIXES))
        entry[2][mix] = number
    maps.sort(key=lambda one: -one[0])  # stable
    call.num_maps, call.num_subsets = len(maps), len(subsets)
    for m, (_, given) in enumerate(maps):
        one = call.maps[m]
        one.members, one.first_pair, one.number, one.code = given
    for s, (members, (pair, index, numbers)) in enumerate(subsets.items()):
        one = call.subsets[s]
        one.members, one.first_pair, one.index, one.number[:] = members, pair, index, numbers
