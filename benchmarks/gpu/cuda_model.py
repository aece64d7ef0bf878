"""The MODEL of model.py for the CUDA kernels: instructions of their machine code over the same assumed rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cards import CARDS, LAUNCH_S, Card
from .cuda_call import reach_of
from .cuda_compiled import CudaCompiled
from .cuda_counts import TileCount, tiles_on
from .cuda_shapes import PASSES, Tiles, maps_of, pairs_of, shapes
from .model import Spread, Tile, bounds, worst
from .occupancy import programs_per_core
from .workloads import PROBLEMS, WORKLOADS, Problem, Workload

# Packing, statistics, their sum; packing, clearing and finding bad labels, gradients, their sum, parameters' sum, and
# four parameter gradients cleared.
LAUNCHES = 3 + 10
_FLOAT, _LABEL = 4, 8
_RESERVED = 1024  # bytes of shared memory that CUDA keeps of every block


@dataclass(frozen=True)
class CudaEstimate:
    """The model's figures for one workload on one card: seconds by resource, see `model.bounds`; launches of a step."""

    workload: Workload
    card: Card
    forward: dict[str, float]
    backward: dict[str, float]
    launches: int

    @property
    def seconds(self) -> float:
        """The step: its kernels and its launches."""
        return worst(self.forward)[1] + worst(self.backward)[1] + self.launches * LAUNCH_S


def cuda_tile(one: TileCount, chunk_tiles: int, l1: int) -> Tile:
    """Instructions and traffic of a tile, with its share of what a block costs besides.

    Args:
        one: counts.
        chunk_tiles: tiles of an item.
        l1: bytes of a core's first cache that shared memory leaves.
    """

    def with_start(of_tile: float, of_start: float) -> float:
        return of_tile + of_start / chunk_tiles

    tile, start = one.tile, one.start
    floats = with_start(tile.floats, start.floats)
    special = with_start(tile.classes["special"], start.classes["special"])
    kinds = ("global_load", "global_store", "shared", "shuffle")
    moves = with_start(sum(tile.classes[k] for k in kinds), sum(start.classes[k] for k in kinds))
    issued = with_start(tile.issued, start.issued)
    # What a tile reads first comes from L2; what it reads again, as far as L1 does not hold it.
    hits = min(1.0, l1 / max(tile.different, 1))
    missed = tile.different + (1 - hits) * max(0, tile.loaded - tile.different)
    return Tile(
        issued=floats + special + moves,
        other=issued - floats - special - moves,
        floats=floats,
        special=special,
        wavefronts=with_start(tile.wavefronts, start.wavefronts),
        macs=0,
        scratch_loads=0,
        scratch_stores=missed + max(0.0, with_start(tile.stored, start.stored)),  # all that L2 is asked for
        touched=1,  # no scratch of a program's own
    )


def _native(workload: Workload, problem: Problem) -> tuple[tuple[int, int, int], list[tuple[int, ...]]]:
    full = (1, *workload.full) if problem.dims == 2 else workload.full
    return full, [tuple(-(-n // ratio) for n in full) for ratio in problem.ratios]  # type: ignore[return-value]


def cuda_spread(which: str, workload: Workload, tiles: Tiles, resident: int, card: Card) -> Spread:
    """How the tiles of "forward" or "backward" lie on a card."""
    problem = PROBLEMS[workload.problem]
    classes, scales = problem.classes, len(problem.ratios)
    full, native = _native(workload, problem)
    # Of the first core, which has most: its blocks, and the items that each of them takes in turn.
    items = sum(-(-(tiles.items - first) // tiles.blocks) for first in range(0, tiles.blocks, card.cores))
    logits = workload.batch * classes * _FLOAT * sum(math.prod(size) for size in native)
    sums = maps_of(scales) * (1 + 2 * classes) * tiles.items if which == "forward" else 0
    once = logits + workload.pixels * _LABEL + 2 * sums * _FLOAT
    again = 0.0
    if which == "backward":  # gradients, labels once more, what is gathered, and the products of each block
        partial = sum(
            math.prod(reach_of(f, n, t) for f, n, t in zip(full, size, tiles.sizes, strict=True))
            for size in native
            if size != full
        )
        products = tiles.blocks * pairs_of(scales) * (classes + 1) ** 2
        partial *= workload.batch * tiles.per_sample * classes
        again = logits + workload.pixels * _LABEL + 2 * _FLOAT * (partial + products)
    return Spread(
        tiles=workload.batch * tiles.per_sample,
        busiest=items * tiles.chunk_tiles,
        resident=max(1, min(resident, -(-tiles.blocks // card.cores))),
        programs=tiles.blocks,
        compulsory=once + again,
    )


def cuda_estimate(
    workload: Workload, card: Card, counted: Sequence[TileCount], compiled: Sequence[CudaCompiled], around: int
) -> CudaEstimate:
    """The model's figures for one workload on one card.

    Args:
        workload, card: which.
        counted: tiles, among them those of this problem on this card.
        compiled: variants, likewise.
        around: launches of the loss around its kernels.

    Raises:
        ValueError: a tile or a variant is not among those given.
    """
    problem = PROBLEMS[workload.problem]
    found = {}
    for which in PASSES:
        tiles = tiles_on(workload, which, card.arch, card.cores)
        wanted = (workload.problem, which, card.arch, tiles.log_size)
        variant = (which, card.arch, problem.classes, max(4, len(problem.ratios)))
        one = next((c for c in counted if c.key == wanted), None)
        built = next((c for c in compiled if (c.kernel, c.arch, c.classes, c.scales) == variant), None)
        if one is None or built is None:
            raise ValueError(
                f"counted, compiled: got none for {wanted} and {variant}, expected every tile that the model needs; "
                "run python -m benchmarks.gpu without --saved"
            )
        threads = shapes()[which, problem.classes, len(problem.ratios)].threads
        resident = programs_per_core(card.arch, built.registers, threads // 32, tiles.shared)
        spread = cuda_spread(which, workload, tiles, resident, card)
        left = max(0, card.l1 - spread.resident * (tiles.shared + _RESERVED))
        found[which] = bounds(cuda_tile(one, tiles.chunk_tiles, left), spread, card)
    return CudaEstimate(workload, card, found["forward"], found["backward"], LAUNCHES + around)


def all_cuda_estimates(counted: Sequence[TileCount], compiled: Sequence[CudaCompiled]) -> list[CudaEstimate]:
    """Every workload on every card."""
    from .official import rest_of_ours

    around = {name: rest_of_ours(p.classes, p.dims, p.ratios).launches for name, p in PROBLEMS.items()}
    return [cuda_estimate(w, card, counted, compiled, around[w.problem]) for w in WORKLOADS for card in CARDS]
