"""Launch configurations, from a small table by device and problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

# Scratch of all programs together, and partial sums of all items, stay under these.
SCRATCH_BYTES = 128 * 2**20
PARTIAL_BYTES = 64 * 2**20

# Classes that are all in registers at once, forward and backward; more come in vectors of at most _VECTOR.
MOST_FORWARD = 16
MOST_BACKWARD = 12  # at 16 one variant in four spilled
_VECTOR = 8
_FEW = 9  # with two pixels a thread


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        tile: output pixels of a tile along z, y, x; powers of two.
        warps: of 32 (AMD: 32 or 64) threads a program.
        pixels: forward, pixels of a map that a program takes at once; its warps take one map each.
        block: pixels that a program interpolates at once.
        span: pixels that a matrix product takes at once.
        per_core: programs for each multiprocessor, at most.
    """

    tile: tuple[int, int, int]
    warps: int
    pixels: int
    block: int
    span: int
    per_core: int

    @property
    def size(self) -> int:
        """Pixels of a tile."""
        return self.tile[0] * self.tile[1] * self.tile[2]


@dataclass(frozen=True)
class Target:
    """What decides a configuration about a device.

    Attributes:
        kind: "cuda", "hip" or "interpreter".
        arch: 80, 90, ... or "gfx942", ...; 0 in the interpreter.
        cores: multiprocessors.
        lanes: threads of a warp.
    """

    kind: str
    arch: int | str
    cores: int
    lanes: int


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when triton itself is imported."""
    return not isinstance(tl.zeros_like, triton.JITFunction)


@triton.jit
def _count_kernel():
    for _ in range(tl.program_id(0) + 1):
        pass


@lru_cache(maxsize=1)
def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run these kernels here, or None; tried with a loop over a number of its own.

    Its releases up to 3.6 at least make numbers of arrays of one element, which numpy refuses from 2.4 on.
    """
    try:
        _count_kernel[(1,)]()
    except Exception as error:  # its own class, which releases name differently
        import numpy

        return (
            f"the interpreter of triton {triton.__version__} fails with numpy {numpy.__version__} ({error}); run: pip "
            "install 'numpy<2.4', or upgrade triton"
        )
    return None


@lru_cache(maxsize=16)
def target_of(device: torch.device) -> Target:
    """Describe a device; in the interpreter two programs at a time, so that buffers are shared out as on a GPU."""
    if interpreted() or device.type == "cpu":
        return Target("interpreter", 0, 1, 32)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, properties.multi_processor_count, properties.warp_size)
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", major * 10 + minor, properties.multi_processor_count, 32)


def vector(classes: int, most: int) -> int:
    """Classes at a time: all of them up to `most`, otherwise parts of nearly the same size."""
    parts = 1 if classes <= most else -(-classes // _VECTOR)
    return -(-classes // parts)


def options(target: Target, warps: int) -> dict[str, object]:
    """Options of a launch or a compilation.

    No software pipelining: what a loop reads next may be what it writes now. On NVIDIA all 255 registers may be used:
    left to itself ptxas spills a few to fit one more program on a core.
    """
    common: dict[str, object] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return common | {"maxnreg": 255} if target.kind == "cuda" else common


def dot_precision(target: Target) -> str:
    """How float32 matrix products are made: in float32, or in three products of tf32 where tensor cores are quick.

    Three tf32 products are as exact as float32 (errors about 2^-21), and on data-centre chips several times as fast as
    its arithmetic; on consumer chips, whose tf32 rate is that of float32, they would be three times as slow.
    """
    return "tf32x3" if target.kind == "cuda" and target.arch in (80, 90, 100, 103) else "ieee"


_TILES = {  # by spatial axes: forward, backward up to _FEW classes, backward beyond
    1: ((1, 1, 512), (1, 1, 256), (1, 1, 128)),
    2: ((1, 16, 32), (1, 8, 32), (1, 4, 32)),
    3: ((8, 8, 8), (4, 8, 8), (4, 4, 8)),
}
_INTERPRETER_MOST = {1: (1, 1, 2048), 2: (1, 64, 64), 3: (8, 16, 16)}


def axes(full: tuple[int, int, int]) -> int:
    """Axes that tiles extend along: 3 for volumes, 2 for images, 1 for lines and images of one row."""
    return 3 if full[0] > 1 else 2 if full[1] > 1 else 1


def _interpreter_tile(full: tuple[int, int, int]) -> tuple[int, int, int]:
    """As large as the image, up to a limit: an operation there costs about the same for any number of pixels."""
    z, y, x = (
        min(triton.next_power_of_2(n), most) for n, most in zip(full, _INTERPRETER_MOST[axes(full)], strict=True)
    )
    return z, y, max(x, 64 // (z * y))


def forward_config(target: Target, full: tuple[int, int, int], classes: int) -> Config:
    """Configuration of the statistics; `classes` C."""
    if target.kind == "interpreter":
        return Config(_interpreter_tile(full), 4, 1024, 4096, 4096, 2)
    return Config(_TILES[axes(full)][0], 4, target.lanes, 128, 64, 4)


def backward_config(target: Target, full: tuple[int, int, int], classes: int) -> Config:
    """Configuration of the gradients; `classes` C."""
    if target.kind == "interpreter":
        return Config(_interpreter_tile(full), 4, 0, 4096, 4096, 2)
    return Config(_TILES[axes(full)][1 if classes <= _FEW else 2], 4, 0, 128, 32, 2)


def candidates(usual: Config, limit: int = 4096) -> list[Config]:
    """What LOMIX_FAST_AUTOTUNE=1 tries: the usual configuration, then other widths and numbers of programs."""
    z, y, x = usual.tile
    wide, narrow = replace(usual, tile=(z, y, 2 * x)), replace(usual, tile=(z, y, x // 2))
    tiles = [usual, *[c for c in (wide, narrow) if 64 <= c.size <= limit]]
    return [replace(c, per_core=n) for c in tiles for n in (usual.per_core, 2 * usual.per_core, 1)]
