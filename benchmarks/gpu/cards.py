"""What the model assumes about three cards, and about how well a kernel uses them. Nothing here has been measured."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.6  # of every peak below that our kernels are assumed to reach
LAUNCH_S = 5e-6  # of the host for one launch
SYNC_S = 10e-6  # one wait of the host for the device
SCHEDULERS = 4  # instructions of a warp that a core issues a clock
WAVEFRONT = 128  # bytes of a load or store that a core does a clock
# Instructions of an operation on a warp, as the compilers' listings show them for float32.
EXP_SLOTS, LOG_SLOTS, DIVIDE_SLOTS = 5, 20, 8
MMA_MACS = 16 * 8 * 8  # multiply-adds of one matrix instruction


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        name: as people say it.
        arch: of the kernels that it runs.
        cores: multiprocessors.
        clock: Hz.
        lanes, special: float32 lanes and special function units of a core.
        l1, l2: bytes, of a core and of the card; l1 is what shared memory may take as well.
        l2_rate, memory_rate: bytes a second.
        memory: bytes.
        tf32: floating point operations a second of the matrix units, dense.
    """

    name: str
    arch: str
    cores: int
    clock: float
    lanes: int
    special: int
    l1: int
    l2: int
    l2_rate: float
    memory_rate: float
    memory: int
    tf32: float

    @property
    def matrix(self) -> bool:
        """Whether float32 products are made as three of tf32, as `lomix_fast.kernels.config.dot_precision` has it."""
        return self.arch in ("sm_80", "sm_90")


_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
# Vendors' data sheets; L2 rates are assumptions, of the order that microbenchmarks of these chips report.
CARDS = (
    Card("H100 SXM", "sm_90", 132, 1.83e9, 128, 16, 256 * _KIB, 50 * _MIB, 5.5e12, 3.35e12, 80 * _GIB, 494e12),
    Card("A100 SXM 80GB", "sm_80", 108, 1.41e9, 64, 16, 192 * _KIB, 40 * _MIB, 4.5e12, 2.04e12, 80 * _GIB, 156e12),
    Card("RTX 4090", "sm_89", 128, 2.52e9, 128, 16, 128 * _KIB, 72 * _MIB, 5.0e12, 1.01e12, 24 * _GIB, 82.6e12),
)
