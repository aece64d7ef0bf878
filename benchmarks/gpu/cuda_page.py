"""The part of docs/gpu-model.md about the CUDA kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cards import CARDS
from .compiled import Compiled
from .counts import Executed
from .cuda_compiled import cuda_table, judge_cuda
from .cuda_counts import PARTS, TileCount
from .cuda_model import CudaEstimate, all_cuda_estimates
from .cuda_report import CudaReport
from .model import Estimate, tile_cost, worst
from .table import markdown, verdict_table
from .workloads import PROBLEMS

_COMPILED = """## The CUDA kernels

Of C = 1 to 16 in float32, `csrc/cuda/few.cu`. Compiled by nvcc {nvcc} with the flags of the package's build; figures
of all variants are in [cuda-compiled.csv](../benchmarks/results/cuda-compiled.csv).

{verdicts}

Registers of a thread; in brackets the blocks that fit on a multiprocessor by registers, threads and the shared memory
of a tile on a large image, and the share of its warps that these are. **B** and **sp**: bytes of stack and of spills.

{registers}
"""
_COUNTED = """### What a pixel costs in instructions, Triton and CUDA side by side

CUDA: **counted in the machine code**. A small interpreter of the instruction set executes the kernel that nvcc {nvcc}
made, with the argument that a launch would pass, and counts every instruction that a warp issues for a tile in the
middle of an image: addresses, loop counters and both sides of a branch where lanes part. It is right about what the
kernels compute: tests compare statistics and gradients of whole images with the plain implementation. Triton: what the
model assumes, operations of its interpreter and address instructions in the proportion in which they stand in the
binary; see above. Instructions of warps x 32 for each pixel; of these on float32 lanes, and on special function units.
Wavefronts (x 32) of loads and stores are each 128 bytes of registers, and more where banks or lines conflict: `+`.

{pixels}

Which functions of `csrc/cuda` they come from, x 32 for each pixel; an instruction counts for the innermost of these.
In brackets wavefronts of loads and stores, likewise.

{parts}
"""
_MODEL = """### The CUDA kernels in the same model

A **model**, as above and with the same rates and the same share of them: counted instructions over assumed rates.
Nothing was measured, and it leaves out the same things: latency, dependences, and how well few warps fill the time.
Different here: address instructions are counted rather than scaled, and so are bank conflicts. What a tile reads from
memory for the first time comes from L2, what it reads again does so as far as L1, less the blocks' shared memory, does
not hold it; all stores go to L2.

{times}
"""


def cuda_part(
    cuda: CudaReport,
    triton: Sequence[Compiled],
    executed: Mapping[str, Mapping[str, Executed]],
    estimates: Sequence[Estimate],
) -> str:
    """Markdown about the CUDA kernels.

    Args:
        cuda: their figures.
        triton: variants of the Triton kernels.
        executed: operations of their tiles.
        estimates: the model's times of them.
    """
    verdicts, registers = verdict_table(judge_cuda(cuda.compiled)), cuda_table(cuda.compiled)
    parts = [_COMPILED.format(nvcc=cuda.nvcc, verdicts=verdicts, registers=registers)]
    if cuda.counted:
        pixels = pixel_table(cuda.counted, triton, executed)
        parts.append(_COUNTED.format(nvcc=cuda.counted_nvcc, pixels=pixels, parts=part_table(cuda.counted)))
        ours = all_cuda_estimates(cuda.counted, cuda.compiled)
        parts.append(_MODEL.format(times=time_table(ours, estimates)))
    return "\n".join(parts)


def _triton_pixel(
    one: TileCount, compiled: Sequence[Compiled], executed: Mapping[str, Mapping[str, Executed]]
) -> tuple[float, float, float, float]:
    """Instructions, floats, special and wavefronts of Triton for each pixel, as the model has them."""
    problem, done = PROBLEMS[one.problem], executed[one.problem][one.which]
    wanted = (one.which, one.arch, problem.classes, problem.dims)
    static = next(c.static for c in compiled if (c.kernel, c.arch, c.classes, c.dims) == wanted)
    matrix = next(card.matrix for card in CARDS if card.arch == one.arch)
    tile = tile_cost(done, static or {}, matrix)
    values = (tile.issued + tile.other, tile.floats, tile.special, tile.wavefronts)
    issued, floats, special, wavefronts = (value * 32 / done.pixels for value in values)
    return issued, floats, special, wavefronts


def pixel_table(
    counted: Sequence[TileCount], compiled: Sequence[Compiled], executed: Mapping[str, Mapping[str, Executed]]
) -> str:
    """Instructions for each pixel, Triton | CUDA."""
    lines = []
    for one in counted:
        theirs = _triton_pixel(one, compiled, executed)
        tile, at = one.tile, one.per_pixel
        ours = (at(tile.issued), at(tile.floats), at(tile.classes["special"]), at(tile.wavefronts))
        cells = [f"{t:.0f} \\| {o:.0f}" for t, o in zip(theirs, ours, strict=True)]
        cells[-1] += f" (+{at(tile.conflicts):.0f})"
        shape = "x".join(str(1 << n) for n in one.log_size if n or PROBLEMS[one.problem].dims == 3)
        lines.append([one.problem, one.which, one.arch, shape, *cells, f"{theirs[0] / ours[0]:.1f}"])
    header = ["Triton \\| CUDA", "", "", "CUDA tile", "issued", "float32", "special", "wavefronts", "issued, ratio"]
    return markdown(header, lines, left=3)


def part_table(counted: Sequence[TileCount]) -> str:
    """Instructions for each pixel by function, of one architecture."""
    chosen = [one for one in counted if one.arch == "sm_80"]
    shown = [part for part in PARTS if any(one.tile.parts[part] for one in chosen)]
    lines = []
    for part in [*shown, ""]:
        issued = [f"{one.per_pixel(one.tile.parts[part]):.0f}" for one in chosen]
        waves = [f"{one.per_pixel(one.tile.part_wavefronts[part]):.0f}" for one in chosen]
        values = [f"{a} ({b})" if int(b) else a for a, b in zip(issued, waves, strict=True)]
        lines.append([f"`{part}`" if part else "others", *values])
    return markdown(["sm_80", *(f"{one.problem}, {one.which}" for one in chosen)], lines)


def time_table(ours: Sequence[CudaEstimate], theirs: Sequence[Estimate]) -> str:
    """The model's times, Triton | CUDA."""
    lines = []
    for cuda, triton in zip(ours, theirs, strict=True):
        problem, w = PROBLEMS[cuda.workload.problem], cuda.workload
        size = "x".join(map(str, w.full)) if problem.dims == 2 else f"{w.full[0]}^3"
        cells = []
        for pair in ((triton.forward, cuda.forward), (triton.backward, cuda.backward)):
            (_, before), (what, seconds) = worst(pair[0]), worst(pair[1])
            cells.append(f"{1e3 * before:.2f} \\| {1e3 * seconds:.2f} ({what})")
        lines.append(
            [
                f"{size} C={problem.classes} L={len(problem.ratios)} B={w.batch}",
                cuda.card.name,
                *cells,
                f"{triton.launches} \\| {cuda.launches}",
                f"{1e3 * triton.seconds:.2f} \\| **{1e3 * cuda.seconds:.2f}**",
                f"{1e3 * triton.seconds_arithmetic:.2f}",
            ]
        )
    header = [
        *("modelled ms, Triton \\| CUDA", "card", "forward", "backward", "launches", "step"),
        "Triton's step without addresses",
    ]
    return markdown(header, lines, left=2)
