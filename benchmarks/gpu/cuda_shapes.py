"""How the CUDA kernels are launched: what csrc/cuda/shapes.h says, and the tiles that csrc/cuda/prepare.cpp takes."""

from __future__ import annotations

import math
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .cuda_build import ROOT

# The header itself is asked, so that a change there reaches the report; the stand-in for cuda_runtime.h will do.
_PROGRAM = """
#include <cstdio>
#include "cuda/shapes.h"
int main() {
  using namespace lomix::cuda;
  for (int pass = 0; pass < 2; ++pass)
    for (int c = 1; c <= kMostFew; ++c)
      for (int l = 1; l <= kFewScales; ++l) {
        const Problem problem{c, l, true, false, false};
        const Shape s = pass ? backward_shape<float>(problem) : forward_shape<float>(problem);
        std::printf("%d %d %d %d %d %d %d %d %lld %lld %lld %lld\\n", pass, c, l, s.threads, s.strip, s.least_strips,
                    s.most_strips, s.blocks, static_cast<long long>(s.shared_fixed),
                    static_cast<long long>(s.shared_per_strip), static_cast<long long>(s.room),
                    static_cast<long long>(s.warp_sums));
      }
}
"""
PASSES = ("forward", "backward")
# Bytes of shared memory that a block may ask for, and that the blocks of a multiprocessor have together.
MOST_SHARED = 96 << 10  # kMostShared of shapes.h
SHARED = {"sm_80": (163 << 10, 164 << 10), "sm_89": (99 << 10, 100 << 10), "sm_90": (227 << 10, 228 << 10)}


@dataclass(frozen=True)
class Shape:
    """`lomix::cuda::Shape` of a pass, without what only many classes need."""

    threads: int
    strip: int
    least_strips: int
    most_strips: int
    blocks: int
    shared_fixed: int
    shared_per_strip: int
    room: int
    warp_sums: int


@dataclass(frozen=True)
class Tiles:
    """`lomix::cuda::Tiling` of a pass, and the bytes of shared memory of a block."""

    log_size: tuple[int, int, int]
    strips: int
    counts: tuple[int, int, int]
    chunks: int
    chunk_tiles: int
    items: int
    blocks: int
    shared: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Pixels of a tile along z, y and x."""
        z, y, x = (1 << n for n in self.log_size)
        return z, y, x

    @property
    def per_sample(self) -> int:
        """Tiles of a sample."""
        return math.prod(self.counts)


def _ask(program: str) -> str:
    """What a C++ program says that includes the headers of csrc."""
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        source, target = Path(folder) / "asked.cpp", Path(folder) / "asked"
        source.write_text(program, encoding="utf-8")
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host' / 'include'}"]
        command = ["g++", "-std=c++20", "-Wno-invalid-offsetof", *include, str(source), "-o", str(target)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            raise RuntimeError(f"csrc/cuda: got this from g++, expected a program: {built.stderr[-1000:]}")
        return subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout


def call_layout(names: tuple[str, ...]) -> dict[str, int]:
    """Sizes of types, "Scale", and offsets of their members, "Scale::grad", as csrc/cuda/call.h has them."""
    lines = [
        f'std::printf("%zu\\n", offsetof({kind}, {field}));' if field else f'std::printf("%zu\\n", sizeof({kind}));'
        for kind, _, field in (name.partition("::") for name in names)
    ]
    head = '#include <cstddef>\n#include <cstdio>\n#include "cuda/call.h"\nusing namespace lomix::cuda;\n'
    said = _ask(head + "int main() {\n" + "\n".join(lines) + "\n}\n")
    return dict(zip(names, map(int, said.split()), strict=True))


@cache
def shapes() -> dict[tuple[str, int, int], Shape]:
    """Shapes of calls that are not general, by pass, classes and scales, as the header has them.

    Raises:
        RuntimeError: the header does not compile.
    """
    said = _ask(_PROGRAM)
    found = {}
    for line in said.splitlines():
        number, classes, scales, *rest = map(int, line.split())
        found[PASSES[number], classes, scales] = Shape(*rest)
    return found


def tiles_of(
    which: str, arch: str, cores: int, classes: int, scales: int, full: tuple[int, int, int], batch: int
) -> Tiles:
    """The tiles that a launch takes: `choose_tiles` and `share_out` of csrc/cuda/prepare.cpp.

    Args:
        which: "forward" or "backward".
        arch: a key of SHARED.
        cores: multiprocessors of the card.
        classes, scales: of the problem; all maps of its scales.
        full: pixels along z, y, x.
        batch: samples.
    """
    shape = shapes()[which, classes, scales]
    a_block, together = SHARED[arch]
    most = min(together // shape.blocks - 1024, a_block, MOST_SHARED) if which == "forward" else a_block
    strips = shape.most_strips
    while True:
        log_size = _grow(strips * shape.strip, full)
        counts = tuple(-(-size // (1 << log)) for size, log in zip(full, log_size, strict=True))
        shared = shape.shared_fixed + strips * shape.shared_per_strip + 8 * scales * sum(1 << n for n in log_size)
        if strips <= shape.least_strips:
            break
        enough = batch * math.prod(counts) >= 2 * shape.blocks * cores
        small = strips * shape.strip < 2 * math.prod(full)
        if shared <= most and small and (enough or strips <= 4 * shape.least_strips):
            break
        strips //= 2
    per_sample, pairs = math.prod(counts), pairs_of(scales)
    item = 4 * maps_of(scales) * (1 + 2 * classes) if which == "forward" else 0
    block = 0 if which == "forward" else 4 * pairs * (classes + 1) ** 2
    blocks = max(1, min((64 << 20) // max(block, 1), shape.blocks * cores))
    most_chunks = min(per_sample, max(1, (64 << 20) // max(item * batch, 1)))

    def busiest(wanted: int) -> int:
        """Tiles of the block that has most, if samples are split into so many chunks."""
        tiles = -(-per_sample // wanted)
        return -(-batch * -(-per_sample // tiles) // blocks) * tiles

    # The fewest chunks among the best; `min` takes the first.
    choices = [1, *(min(max(1, rounds * blocks // batch), most_chunks) for rounds in range(1, 5))]
    chunk_tiles = -(-per_sample // min(choices, key=busiest))
    chunks = -(-per_sample // chunk_tiles)
    items = batch * chunks
    return Tiles(log_size, strips, counts, chunks, chunk_tiles, items, min(blocks, items), shared)  # type: ignore[arg-type]


def _grow(pixels: int, full: tuple[int, int, int]) -> tuple[int, int, int]:
    """log2 of the pixels of a tile along each axis: x up to 8 pixels first, then evenly."""
    logs, made = [0, 0, 0], 1

    def is_open(axis: int) -> bool:
        return 1 << logs[axis] < full[axis]

    while made < pixels:
        axis = 2
        if logs[2] >= 3 or not is_open(2):
            for other in (1, 0):
                if is_open(other) and (logs[other] < logs[axis] or not is_open(axis)):
                    axis = other
        logs[axis] += 1
        made *= 2
    return logs[0], logs[1], logs[2]


def subsets_of(scales: int) -> list[tuple[int, ...]]:
    """Members of every subset of two scales or more, in the order of `lomix_fast.plan`."""
    from itertools import combinations

    return [members for size in range(2, scales + 1) for members in combinations(range(scales), size)]


def pairs_of(scales: int) -> int:
    """Pairs of a subset and a member of it."""
    return sum(len(members) for members in subsets_of(scales))


def maps_of(scales: int) -> int:
    """Maps of all operators: every scale, and four of every subset."""
    return scales + 4 * len(subsets_of(scales))
