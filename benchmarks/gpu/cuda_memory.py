"""Memory of a block: global, shared, and what accesses of a warp to them cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LINE, SECTOR, BANKS = 128, 32, 32  # bytes of a line and of the part of it that moves; banks of 4 bytes
GLOBAL = 1 << 33  # address of the first byte
SHARED = 1 << 42  # of shared memory in the address space of all memory
Addresses = npt.NDArray[np.uint64]


class Memory:
    """Global memory as one array, and the shared memory of a block.

    Attributes:
        data, shared: bytes, as words of 32 bits.
        loaded, stored: sectors of global memory touched since `forget`, one entry an access.
    """

    def __init__(self, shared: int) -> None:
        self.data = np.zeros(0, np.uint32)
        self.shared = np.zeros(-(-shared // 4), np.uint32)
        self.loaded: list[npt.NDArray[np.uint64]] = []
        self.stored: list[npt.NDArray[np.uint64]] = []

    def place(self, array: npt.NDArray[np.generic]) -> int:
        """Copy an array to the end of global memory, at a multiple of 256 bytes; returns its address."""
        raw = array.tobytes()
        words = np.frombuffer(raw + bytes(-len(raw) % 256), np.uint32)
        address = GLOBAL + 4 * self.data.size
        self.data = np.concatenate([self.data, words])
        return address

    def read_back(self, address: int, like: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """An array from global memory."""
        first = (address - GLOBAL) // 4
        raw = self.data[first : first + -(-like.nbytes // 4)].tobytes()[: like.nbytes]
        return np.frombuffer(raw, like.dtype).reshape(like.shape)

    def words(self, address: Addresses, space: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], bool]:
        """The array that addresses lie in, places in it, and whether it is shared memory.

        Raises:
            IndexError: an address outside.
        """
        is_shared = space == "shared" or (space == "any" and bool(address[0] >= SHARED))
        base = 0 if space == "shared" else SHARED if is_shared else GLOBAL
        array = self.shared if is_shared else self.data
        place = (address - np.uint64(base)).view(np.int64) >> 2
        if place.min() < 0 or place.max() >= array.size:
            kind = "shared" if is_shared else "global"
            raise IndexError(f"address: got {int(address.min()):#x} to {int(address.max()):#x}, not in {kind} memory")
        return array, place, is_shared

    def note(self, address: Addresses, size: int, is_shared: bool, is_store: bool) -> int:
        """Wavefronts of one access of a warp, each of 128 bytes; sectors of global memory are kept.

        Registers take 128 bytes a clock even where all lanes read one address. Beyond that, shared memory serves every
        bank once a wavefront, global memory one line.

        Args:
            address: of the lanes that take part.
            size: bytes of each.
            is_shared: otherwise global.
            is_store: whether it writes.
        """
        parts = max(size // 4, 1)
        if not is_shared:
            sectors = np.unique(address >> np.uint64(5))
            if size == 16 or size == 8:
                sectors = np.unique(np.concatenate([sectors, (address + np.uint64(size - 1)) >> np.uint64(5)]))
            (self.stored if is_store else self.loaded).append(sectors)
            return max(parts, np.unique(sectors >> np.uint64(2)).size)
        group, count = 32 // parts, 0
        for first in range(0, len(address), group):
            words = np.unique(address[first : first + group] >> np.uint64(2))
            if parts > 1:
                words = np.unique(words[:, None] + np.arange(parts, dtype=np.uint64))
            count += int(np.bincount((words & np.uint64(BANKS - 1)).astype(np.int64)).max())
        return max(count, parts)

    def forget(self) -> None:
        """Begin to count sectors anew."""
        self.loaded, self.stored = [], []

    def traffic(self) -> tuple[int, int, int]:
        """Bytes of global memory: of all loads, of different sectors loaded, of all stores."""

        def total(lists: Sequence[npt.NDArray[np.uint64]]) -> int:
            return SECTOR * sum(len(one) for one in lists)

        different = SECTOR * np.unique(np.concatenate(self.loaded)).size if self.loaded else 0
        return total(self.loaded), different, total(self.stored)
