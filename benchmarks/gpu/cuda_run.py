"""One launch executed by the interpreter of machine code, one block or all of them."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cuda_build import Binary
from .cuda_call import Launch, call_type
from .cuda_listing import Kernel, read_kernel
from .cuda_memory import SHARED, Memory
from .cuda_warp import Block

_RESERVED = 1024  # bytes of shared memory that come before the kernel's on sm_90
_BLOCK_DIM, _GRID_DIM, _WINDOW = 0x0, 0xC, 0x18  # places in constant bank 0


@dataclass
class Machine:
    """A kernel, and memory with a launch's arrays in it.

    Attributes:
        kernel, launch, memory: what runs.
        addresses: of the launch's arrays.
        banks: constants.
    """

    kernel: Kernel
    launch: Launch
    memory: Memory
    addresses: dict[str, int]
    banks: dict[int, bytes]

    def run(self, block: int) -> Block:
        """Run one block to its end; memory keeps what it wrote."""
        self.memory.shared[:] = 0x7FC12345  # no number: what is read was written before
        made = Block(self.kernel, self.banks, self.memory, self.launch.shape.threads // 32, block)
        with np.errstate(all="ignore"):
            made.run()
        return made

    def result(self, name: str) -> npt.NDArray[np.generic]:
        """An array of the launch as memory has it now."""
        return self.memory.read_back(self.addresses[name], self.launch.arrays[name])


def make_machine(binary: Binary, launch: Launch) -> Machine:
    """Put a launch's arrays into memory and its argument into constants."""
    scales = launch.call.num_scales
    name = launch.which if launch.which == "forward" else f"{launch.which} {max(4, scales)}"
    kernel = read_kernel(binary, name, ctypes.sizeof(call_type()))
    memory, addresses = Memory(launch.tiles.shared + _RESERVED), {}
    call = call_type().from_buffer_copy(launch.call)
    for field, array in launch.arrays.items():
        addresses[field] = memory.place(array)
        first, *rest = field.split(".")
        if rest:
            setattr(call.scales[int(rest[0])], rest[1], addresses[field])
        else:
            setattr(call, first, addresses[field])
    head = bytearray(kernel.parameters)
    struct.pack_into("<3I", head, _BLOCK_DIM, launch.shape.threads, 1, 1)
    struct.pack_into("<3I", head, _GRID_DIM, launch.tiles.blocks, 1, 1)
    struct.pack_into("<Q", head, _WINDOW, SHARED)
    return Machine(kernel, launch, memory, addresses, {0: bytes(head) + bytes(call), 2: kernel.constants})
