"""Instructions that one tile of a CUDA kernel issues, counted by executing the kernel's machine code."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from .cards import CARDS
from .cuda_build import Binary, compile_few
from .cuda_call import fit_tiles, make_inputs, make_launch
from .cuda_listing import Kernel
from .cuda_run import make_machine
from .cuda_shapes import PASSES, Tiles, tiles_of
from .cuda_warp import Block
from .sass import class_of
from .workloads import PROBLEMS, WORKLOADS, Problem, Workload

# Parts of the kernels: an instruction belongs to the first of these that it was inlined into.
PARTS = (
    *("fill_axes", "stage_scale", "stage_logits", "tile_label", "mix_sum", "mix_mul", "mix_cat", "mix_awf"),
    *("exponentials", "differentiate", "multiply", "unmix_sum", "unmix_mul", "unmix_cat", "unmix_awf"),
    *("clear_rows", "finish_tile", "lane_sum", "lane_sums", "sweep_map", "statistics_few", "gradients_few"),
)
FLOATS = ("float", "compare")
_BY_NAME = ("classes", "ops", "parts", "part_wavefronts")


@dataclass
class Counted:
    """What a part of a launch issues, all in instructions of warps.

    Attributes:
        classes: instructions by class, see `sass.CLASSES`.
        ops: the same by mnemonic with the first modifier of MUFU, "MUFU.EX2".
        parts: the same by function of the source, see PARTS; "" for none of them.
        part_wavefronts: of `wavefronts` likewise.
        wavefronts: of loads and stores, each of 128 bytes; of these `conflicts` are those that a bank or a line costs
            beyond what the registers take.
        loaded, different, stored: bytes of global memory, in sectors of 32: of all loads, of different ones, of stores.
    """

    classes: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    part_wavefronts: Counter[str] = field(default_factory=Counter)
    wavefronts: int = 0
    conflicts: int = 0
    loaded: int = 0
    different: int = 0
    stored: int = 0

    @property
    def issued(self) -> int:
        """Instructions of all classes."""
        return sum(self.classes.values())

    @property
    def floats(self) -> int:
        """Instructions on float32 lanes."""
        return sum(self.classes[name] for name in FLOATS)

    def minus(self, other: Counted) -> Counted:
        """The difference, as of a launch of two tiles and one of the first of them."""
        made = Counted()
        for name in _BY_NAME:
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(made, name, Counter({key: mine[key] - theirs[key] for key in mine if mine[key] != theirs[key]}))
        for name in ("wavefronts", "conflicts", "loaded", "different", "stored"):
            setattr(made, name, getattr(self, name) - getattr(other, name))
        return made


@dataclass(frozen=True)
class TileCount:
    """One kernel on one problem.

    Attributes:
        problem, which, arch: a key of PROBLEMS, "forward" or "backward", such as "sm_80".
        log_size, strips: of the tile.
        pixels: of the tile, all inside the image.
        tile: what a tile costs.
        start: what a block costs besides.
    """

    problem: str
    which: str
    arch: str
    log_size: tuple[int, int, int]
    strips: int
    pixels: int
    tile: Counted
    start: Counted

    @property
    def key(self) -> tuple[str, str, str, tuple[int, int, int]]:
        """What decides the counts."""
        return self.problem, self.which, self.arch, self.log_size

    def per_pixel(self, instructions: float) -> float:
        """Instructions of a lane for each pixel, out of instructions of warps for a tile."""
        return instructions * 32 / self.pixels


def op_name(op: str) -> str:
    """The mnemonic; of MUFU with the function."""
    return ".".join(op.split(".")[:2]) if op.startswith("MUFU") else op.partition(".")[0]


def part_of(functions: Sequence[str]) -> str:
    """The part that an instruction belongs to."""
    return next((name for name in functions if name in PARTS), "")


def sum_up(kernel: Kernel, blocks: Sequence[Block], traffic: tuple[int, int, int]) -> Counted:
    """What blocks issued; padding (NOP) is no instruction."""
    made = Counted()
    for block in blocks:
        for one, times, wavefronts in zip(kernel.code, block.issued, block.wavefronts, strict=True):
            if times and one.mnemonic != "NOP":
                made.classes[class_of(one.mnemonic)] += int(times)
                made.ops[op_name(one.op)] += int(times)
                made.parts[part_of(one.functions)] += int(times)
                made.part_wavefronts[part_of(one.functions)] += int(wavefronts)
                made.wavefronts += int(wavefronts)
        made.conflicts += int(block.wavefronts.sum() - block.least_wavefronts.sum())
    made.loaded, made.different, made.stored = traffic
    return made


def count_tile(binary: Binary, name: str, problem: Problem, which: str, tiles: Tiles) -> TileCount:
    """Count a tile in the middle of an image of a few tiles.

    A launch of one tile and one of that tile and the next differ by a tile.

    Args:
        binary: compiled for the problem's classes.
        name: of the problem.
        problem: its classes, axes and scales.
        which: "forward" or "backward".
        tiles: of a workload, see `cuda_shapes.tiles_of`.
    """
    coarsest = max(problem.ratios)
    full = tuple(
        1 if axis < 3 - problem.dims else coarsest * -(-max(3 * size, 2 * coarsest) // coarsest)
        for axis, size in enumerate(tiles.sizes)
    )
    inputs = make_inputs(problem.classes, full, problem.ratios)  # type: ignore[arg-type]
    found = []
    for chunk_tiles in (1, 2):
        fitted = fit_tiles(tiles, full, chunk_tiles)  # type: ignore[arg-type]
        counts = fitted.counts
        middle = (counts[0] // 2 * counts[1] + counts[1] // 2) * counts[2] + counts[2] // 2 - 1
        machine = make_machine(binary, make_launch(which, inputs, fitted))
        machine.memory.forget()
        block = machine.run((middle - middle % 2) // chunk_tiles)
        found.append(sum_up(machine.kernel, [block], machine.memory.traffic()))
    one, two = found
    tile = two.minus(one)
    tile.different = one.different  # the second tile finds there what the first has read
    start = one.minus(tile)
    return TileCount(name, which, binary.arch, tiles.log_size, tiles.strips, math.prod(tiles.sizes), tile, start)


def tiles_on(workload: Workload, which: str, arch: str, cores: int) -> Tiles:
    """The tiles that a workload takes on a card."""
    problem = PROBLEMS[workload.problem]
    full = (1, *workload.full) if problem.dims == 2 else workload.full
    return tiles_of(which, arch, cores, problem.classes, len(problem.ratios), full, workload.batch)  # type: ignore[arg-type]


def count_on(arch: str, name: str) -> list[TileCount]:
    """Every tile that the model needs of one problem on one architecture."""
    problem = PROBLEMS[name]
    binary, wanted = compile_few(arch, problem.classes), {}
    for workload in WORKLOADS:
        for card in CARDS:
            if workload.problem == name and card.arch == arch:
                for which in PASSES:
                    tiles = tiles_on(workload, which, arch, card.cores)
                    wanted[which, tiles.log_size] = tiles
    return [count_tile(binary, name, problem, which, tiles) for (which, _), tiles in wanted.items()]


def count_all(workers: int) -> list[TileCount]:
    """Count all tiles that the model needs in worker processes, with a line on stderr for each; minutes."""
    found = {}
    todo = [(arch, name) for name in PROBLEMS for arch in sorted({card.arch for card in CARDS})]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(count_on, *one): one for one in todo}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            print(f"executed the machine code of {' '.join(waiting[future])}", file=sys.stderr, flush=True)
    return [one for key in todo for one in found[key]]


def save_counted(path: Path, counted: Sequence[TileCount], nvcc: str) -> None:
    """Write counts as JSON, with the version of nvcc."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [vars(one) | {"tile": vars(one.tile), "start": vars(one.start)} for one in counted]
    path.write_text(json.dumps({"nvcc": nvcc, "tiles": rows}, indent=1) + "\n", encoding="utf-8")


def load_counted(path: Path) -> tuple[list[TileCount], str]:
    """Read what `save_counted` wrote: counts, and the version of nvcc."""
    known = json.loads(path.read_text(encoding="utf-8"))

    def counted(row: dict[str, object]) -> Counted:
        maps = {name: Counter(row[name]) for name in _BY_NAME}
        return Counted(**{**row, **maps})  # type: ignore[arg-type]

    tiles = [
        TileCount(
            **{**row, "log_size": tuple(row["log_size"]), "tile": counted(row["tile"]), "start": counted(row["start"])}
        )
        for row in known["tiles"]
    ]
    return tiles, known["nvcc"]
