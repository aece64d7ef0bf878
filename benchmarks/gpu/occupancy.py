"""How many programs of a kernel fit on one core (SM or CU) at once, from registers, threads and shared memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    """What one core has.

    Attributes:
        lanes: threads of a warp.
        warps, programs: at most at once.
        parts: schedulers; each has its own registers and a part of the warps.
        registers: of one thread's width, times lanes, in one part: what its warps share.
        granule: registers of a thread are rounded up to a multiple of this.
        shared: bytes.
        reserved: bytes of shared memory that every program takes besides its own.
    """

    lanes: int
    warps: int
    programs: int
    parts: int
    registers: int
    granule: int
    shared: int
    reserved: int


# CUDA C++ Programming Guide, "Compute Capabilities"; AMD's CDNA3 and RDNA3 instruction set guides, a CU by itself.
CORES = {
    "sm_80": Core(32, 64, 32, 4, 512, 8, 164 * 1024, 1024),
    "sm_89": Core(32, 48, 24, 4, 512, 8, 100 * 1024, 1024),
    "sm_90": Core(32, 64, 32, 4, 512, 8, 228 * 1024, 1024),
    "sm_100": Core(32, 64, 32, 4, 512, 8, 228 * 1024, 1024),
    "sm_120": Core(32, 48, 24, 4, 512, 8, 100 * 1024, 1024),
    "gfx942": Core(64, 32, 32, 4, 512, 8, 64 * 1024, 0),
    "gfx1100": Core(32, 32, 32, 2, 1536, 24, 64 * 1024, 0),
}


def programs_per_core(arch: str, registers: int, warps: int, shared: int) -> int:
    """Programs that fit on a core at once, 0 where even one does not.

    Args:
        arch: a key of CORES.
        registers: of a thread; for AMD vector registers, accumulation registers included.
        warps: of a program.
        shared: bytes of a program.

    Raises:
        ValueError: an architecture that is not in CORES.
    """
    if arch not in CORES:
        raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(CORES)}; add it to CORES in occupancy.py")
    core = CORES[arch]
    rounded = -(-max(registers, 1) // core.granule) * core.granule
    a_part = min(core.registers // rounded, core.warps // core.parts)
    by_warps = a_part * core.parts // warps
    taken = shared + core.reserved
    by_shared = core.shared // taken if taken else core.programs
    return min(core.programs, by_warps, by_shared)


def occupancy(arch: str, programs: int, warps: int) -> float:
    """Share of the warps that a core can hold: `programs` of `warps` each."""
    return programs * warps / CORES[arch].warps
