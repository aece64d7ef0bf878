"""A block of warps that executes machine code on the CPU and counts what it issues.

Lanes that part at a branch go on by themselves and meet again where the code says: at BSYNC, WARPSYNC and barriers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cuda_decode import Banks, Step, decode, where_of
from .cuda_listing import Instruction, Kernel
from .cuda_memory import SHARED, Memory
from .cuda_values import LANES, PREDICATES, ROWS, TRUE, State, predicate, read_int, register_row

_JUMPS = {"BRA", "BRX", "BRXU", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "BAR", "YIELD", "NOP"}
_DIVERGED = {"WARPSYNC.COLLECTIVE", "ENDCOLLECTIVE"}
Mask = npt.NDArray[np.bool_]


@dataclass(eq=False)
class Group:
    """Lanes of a warp at one place; `waits` says for what: "" for nothing, "meet" or "barrier"."""

    at: int
    mask: Mask
    waits: str = ""
    wanted: Mask | None = None


class Warp:
    """State of one warp, see `cuda_values.State`, and the groups that its lanes are in."""

    def __init__(self, number: int, block: int) -> None:
        self.registers = np.zeros((ROWS, LANES), np.uint32)
        self.predicates = np.zeros((PREDICATES, LANES), bool)
        self.predicates[[TRUE, 8 + TRUE]] = True
        self.thread = np.arange(LANES, dtype=np.uint32) + np.uint32(number * LANES)
        self.block = np.full(LANES, block, np.uint32)
        self.zero = np.zeros(LANES, np.uint32)
        self.window = np.full(LANES, SHARED >> 32, np.uint32)
        self.meetings = np.zeros((16, LANES, LANES), bool)  # of barrier registers: for each lane, who is waited for
        self.mask, self.full = np.ones(LANES, bool), True
        self.groups = [Group(0, np.ones(LANES, bool))]

    @property
    def is_over(self) -> bool:
        """Whether all lanes have ended."""
        return not self.groups

    @property
    def at_barrier(self) -> bool:
        """Whether all lanes that have not ended wait at a barrier of the block."""
        return bool(self.groups) and all(group.waits == "barrier" for group in self.groups)


class Block:
    """One block.

    Attributes:
        issued: instructions of warps, by place in the code.
        wavefronts: of memory, likewise; `least_wavefronts` if only the registers took their time.
    """

    def __init__(self, kernel: Kernel, banks: Banks, memory: Memory, warps: int, block: int) -> None:
        self.kernel, self.code = kernel, kernel.code
        self.issued = np.zeros(len(self.code), np.int64)
        self.wavefronts, self.least_wavefronts = np.zeros((2, len(self.code)), np.int64)
        self.warps = [Warp(n, block) for n in range(warps)]
        self._places = {one.address: n for n, one in enumerate(self.code)}
        self._jumps: dict[int, Callable[[Warp, Group], None]] = {}
        self._steps: list[Step | None] = [None] * len(self.code)
        self._banks, self._memory = banks, memory
        for n, one in enumerate(self.code):
            if one.op in _DIVERGED:
                self._jumps[n] = self._refuse(one)
            elif one.mnemonic in _JUMPS:
                self._jumps[n] = self._jump(n, one)

    def run(self, most: int = 50_000_000) -> None:
        """Run to the end.

        Args:
            most: instructions after which something must have gone wrong.

        Raises:
            RuntimeError: warps wait for each other for ever, or run for ever.
        """
        self._left = most
        while not all(warp.is_over for warp in self.warps):
            for warp in self.warps:
                while any(not group.waits for group in warp.groups):
                    self._advance(warp)
            if not all(warp.is_over or warp.at_barrier for warp in self.warps):
                raise RuntimeError("warps: got lanes that wait for lanes that never come, expected all to meet")
            for warp in self.warps:
                self._merge(warp, "barrier")

    def _advance(self, warp: Warp) -> None:
        """Run the group that is farthest behind until it jumps."""
        group = min((g for g in warp.groups if not g.waits), key=lambda g: g.at)
        warp.mask, warp.full = group.mask, bool(group.mask.all())
        start = at = group.at
        while at not in self._jumps:
            step = self._steps[at]
            if step is None:
                step = self._steps[at] = decode(self.code[at], self._banks, self._memory, self._told(at))
            step(warp)
            at += 1
        group.at = at
        self.issued[start : at + 1] += 1
        self._left -= at + 1 - start
        if self._left < 0:
            raise RuntimeError(f"kernel: got no end after so many instructions, near {self.code[at].address:#x}")
        self._jumps[at](warp, group)

    def _told(self, at: int) -> Callable[[int, int], None]:
        def note(count: int, least: int) -> None:
            self.wavefronts[at] += count
            self.least_wavefronts[at] += least

        return note

    def _refuse(self, one: Instruction) -> Callable[[Warp, Group], None]:
        def run(warp: Warp, group: Group) -> None:
            raise RuntimeError(f"{one.op}: got here with lanes apart, expected them together")

        return run

    def _go(self, warp: Warp, group: Group, taken: Mask, target: int) -> None:
        """Lanes that take a jump leave the group."""
        if (taken == group.mask).all():
            group.at = target
        else:
            group.at += 1
            if taken.any():
                group.mask = group.mask & ~taken
                warp.groups.append(Group(target, taken.copy()))  # predicates change

    def _jump(self, n: int, one: Instruction) -> Callable[[Warp, Group], None]:
        name, given, guarded = one.mnemonic, list(one.operands), where_of(one)
        extra = None
        if name in ("BRA", "BREAK") and len(given) > 1 and given[0].lstrip("!U").startswith("P"):
            row, negated = predicate(given.pop(0))
            extra = (row, negated)

        def lanes(warp: Warp, group: Group) -> Mask:
            found = guarded(warp)
            found = group.mask if found is None else found
            if extra is None:
                return found
            return found & (warp.predicates[extra[0]] ^ extra[1])

        if name in ("BRA", "CALL"):
            target = self.kernel.labels[given[-1].strip("`()")]
            if one.op.startswith("BRA.DIV"):
                return lambda w, g: self._go(w, g, g.mask if not w.full else np.zeros(LANES, bool), target)
            return lambda w, g: self._go(w, g, lanes(w, g), target)
        if name in ("BRX", "BRXU", "RET"):
            text, _, rest = " ".join(given).partition(" ")
            row = register_row(text)
            base = 0 if name == "RET" else one.address + 16 + int(rest, 16)
            return lambda w, g: self._spread(w, g, lanes(w, g), row, base)
        if name == "BSSY":
            barrier = int(given[0][1:])

            def begin(warp: Warp, group: Group) -> None:
                warp.meetings[barrier, group.mask] = group.mask
                group.at += 1

            return begin
        if name == "BREAK":
            barrier = int(given[0][1:])

            def leave(warp: Warp, group: Group) -> None:
                gone = lanes(warp, group)
                if gone.any():
                    warp.meetings[barrier][:, gone] = False
                group.at += 1
                self._merge(warp, "meet")

            return leave
        if name == "BSYNC":
            barrier = int(given[0][1:])
            return lambda w, g: self._wait(w, g, "meet", w.meetings[barrier, int(np.argmax(g.mask))].copy())
        if name == "WARPSYNC":
            mask = None if one.op.endswith(".ALL") else read_int(given[0], self._banks)
            return lambda w, g: self._wait(w, g, "meet", _lanes_of(mask(w)[0] if mask else 0xFFFFFFFF))
        if name == "BAR":
            return lambda w, g: self._wait(w, g, "barrier", None)
        if name == "EXIT":
            return lambda w, g: self._end(w, g, lanes(w, g))

        def nothing(warp: Warp, group: Group) -> None:
            group.at += 1

        return nothing

    def _spread(self, warp: Warp, group: Group, taken: Mask, row: int, base: int) -> None:
        """A jump to the address in a register."""
        targets = warp.registers[row].astype(np.int64) + base
        for address in np.unique(targets[taken]):
            self._go(warp, group, taken & (targets == address), self._places[int(address)])

    def _wait(self, warp: Warp, group: Group, what: str, wanted: Mask | None) -> None:
        group.waits, group.wanted = what, wanted
        if what == "meet":
            self._merge(warp, "meet")

    def _end(self, warp: Warp, group: Group, gone: Mask) -> None:
        group.mask = group.mask & ~gone
        group.at += 1
        if not group.mask.any():
            warp.groups.remove(group)
        self._merge(warp, "meet")

    def _merge(self, warp: Warp, what: str) -> None:
        """Let groups go on, as one, that wait at a place for nobody else; at a barrier when the block has come."""
        alive = np.zeros(LANES, bool)
        for group in warp.groups:
            alive |= group.mask
        for at in sorted({group.at for group in warp.groups if group.waits == what}):
            here = [group for group in warp.groups if group.waits == what and group.at == at]
            together = np.logical_or.reduce([group.mask for group in here])
            for group in here:
                if what == "meet" and group.wanted is not None and (group.wanted & alive & ~together).any():
                    here = []
                    break
            if here:
                warp.groups = [group for group in warp.groups if group not in here]
                warp.groups.append(Group(at + 1, together))


def _lanes_of(bits: int) -> Mask:
    return (int(bits) >> np.arange(LANES) & 1).astype(bool)


def new_state(number: int, block: int) -> State:
    """A warp's state, for tests of single instructions."""
    return Warp(number, block)
