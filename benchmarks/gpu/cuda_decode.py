"""Instructions of a kernel turned into functions on the state of a warp, but for those that jump."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np

from . import cuda_floats as floats
from . import cuda_integers as integers
from .cuda_integers import Results
from .cuda_listing import Instruction
from .cuda_memory import Memory
from .cuda_values import (
    LANES,
    ZERO,
    Reader,
    State,
    constant_of,
    is_predicate,
    predicate,
    read_int,
    read_predicate,
    read_wide,
    register_row,
    write_predicate,
    write_rows,
)

Banks = dict[int, bytes]
Step = Callable[[State], None]
_ADDRESS = re.compile(r"^(?:desc\[UR\d+\])?\[(?P<terms>[^\]]*)\]$")
_SPECIAL_ROWS = {"SR_TID.X": "thread", "SR_CTAID.X": "block", "SR_CgaCtaId": "zero", "SR_SWINHI": "window"}
_MAKERS: dict[str, Callable[..., Results]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD"), integers.add3),
    **dict.fromkeys(("IMAD", "UIMAD"), integers.multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), integers.shift_add),
    **dict.fromkeys(("SHF", "USHF"), integers.shift),
    **dict.fromkeys(("PLOP3", "UPLOP3"), integers.predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP"), integers.compare),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX", "UIMNMX"), integers.extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), integers.permute),
    **dict.fromkeys(("MOV", "UMOV", "IABS", "POPC", "BREV", "FLO", "R2UR"), integers.one_operand),
    **dict.fromkeys(("SEL", "USEL"), integers.select),
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), floats.arithmetic),
    **{"FMNMX": floats.extreme, "FSEL": floats.select, "FSETP": floats.compare, "FCHK": floats.needs_slow_path},
    **{"MUFU": floats.special, "HFMA2": floats.halves, "HADD2": floats.widened},
    **dict.fromkeys(("I2F", "I2FP"), floats.from_integer),
    "F2I": floats.to_integer,
}
_PREDICATES_OUT = {"ISETP": 2, "UISETP": 2, "PLOP3": 2, "UPLOP3": 2, "FSETP": 2, "FCHK": 1}
_LOADS, _STORES = {"LDG": "global", "LD": "any", "LDS": "shared"}, {"STG": "global", "ST": "any", "STS": "shared"}


def decode(one: Instruction, banks: Banks, memory: Memory, wavefronts: Callable[[int, int], None]) -> Step:
    """The function that one instruction is.

    Args:
        one: an instruction that does not jump.
        banks: constants.
        memory: global and shared.
        wavefronts: told what an access of memory cost, and what its registers cost alone.

    Raises:
        ValueError: an instruction that is not known.
    """
    try:
        step = _decode(one, banks, memory, wavefronts)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"instruction: got {one.op} {', '.join(one.operands)} at {one.address:#x}, expected one that the "
            "interpreter knows; teach cuda_decode.py about it"
        ) from error
    return step


def where_of(one: Instruction) -> Callable[[State], np.ndarray | None]:
    """The lanes that an instruction acts on; None for all."""
    if one.guard:
        guard = read_predicate(one.guard)
        return lambda w: guard(w) if w.full else guard(w) & w.mask
    return lambda w: None if w.full else w.mask


def _decode(one: Instruction, banks: Banks, memory: Memory, wavefronts: Callable[[int, int], None]) -> Step:
    name, given = one.mnemonic, list(one.operands)
    where = where_of(one)
    if name in _LOADS or name in _STORES or name == "ATOMS":
        return _access(one, banks, memory, wavefronts)
    if name in ("LDC", "ULDC"):
        return _load_constant(one, banks)
    if name in ("S2R", "S2UR"):
        row, attribute = register_row(given[0]), _SPECIAL_ROWS[given[1]]
        return lambda w: write_rows(w, row, getattr(w, attribute), where(w))
    if name == "CS2R":
        row, value = register_row(given[0]), np.zeros(LANES, np.uint32 if one.op.endswith(".32") else np.uint64)
        return lambda w: write_rows(w, row, value, where(w))
    if name == "SHFL":
        return _shuffle(one, banks)
    if name in ("P2R", "R2P"):
        return _all_predicates(one, banks)
    # Destinations come first: predicates alone, or a register with predicates around it.
    split = _PREDICATES_OUT.get(name, 0)
    if not split:
        split = 1 + (name in ("LOP3", "ULOP3") and is_predicate(given[0]))
        while split < len(given) and name not in ("LOP3", "ULOP3") and is_predicate(given[split]):
            split += 1
    outs, rest = given[:split], given[split:]
    if name in ("LOP3", "ULOP3"):
        results = integers.logic(one.op, split, rest, banks, flag_first=split == 2)
    else:
        results = _MAKERS[name](one.op, split, rest, banks)
    writers = [_writer(text) for text in outs]
    if name.startswith("U"):
        return lambda w: _write(w, writers, results, None)
    return lambda w: _write(w, writers, results, where(w))


def _writer(text: str) -> Callable[..., None]:
    if is_predicate(text):
        return partial(_put, write_predicate, predicate(text)[0])
    return partial(_put, write_rows, register_row(text))


def _put(write: Callable[..., None], row: int, w: State, value: np.ndarray, where: np.ndarray | None) -> None:
    write(w, row, value, where)


def _write(w: State, writers: list[Callable[..., None]], results: Results, where: np.ndarray | None) -> None:
    for write, value in zip(writers, results(w), strict=False):
        write(w, value, where)


def _load_constant(one: Instruction, banks: Banks) -> Step:
    row, place, where = register_row(one.operands[0]), constant_of(one.operands[1], banks), where_of(one)
    if place is None:
        raise IndexError
    bank, index, offset = place
    kind = np.dtype(next((k for m, k in _KINDS.items() if m in one.op.split(".")), "<u4"))
    raw = np.frombuffer(banks[bank] + bytes(8), np.uint8)
    steps = np.arange(kind.itemsize)

    def run(w: State) -> None:
        lanes = where(w)
        at = offset if index is None else offset + w.registers[index].view(np.int32).astype(np.int64)
        at = at if lanes is None else np.where(lanes, at, 0)  # lanes that do not run may hold anything
        taken = raw[np.broadcast_to(at, LANES)[:, None] + steps].view(kind)[:, 0]
        write_rows(w, row, taken.astype(np.uint64 if kind.itemsize == 8 else np.uint32), lanes)

    return run


_KINDS = {"64": "<u8", "U8": "u1", "S8": "i1", "U16": "<u2", "S16": "<i2"}


def _address(text: str, banks: Banks) -> Callable[[State], np.ndarray]:
    found = _ADDRESS.match(text)
    if not found:
        raise IndexError
    readers: list[Reader] = []
    for term in found["terms"].split("+"):
        name, _, mods = term.partition(".")
        if term.startswith(("0x", "-0x")):
            fixed = np.full(LANES, int(term, 16) & (2**64 - 1), np.uint64)
            readers.append(lambda w, fixed=fixed: fixed)  # type: ignore[misc]
        elif mods == "64":
            readers.append(read_wide(name, banks))
        else:
            scale = np.uint64(int(mods[1:])) if mods.startswith("X") else np.uint64(1)
            plain = read_int(name, banks)
            readers.append(lambda w, p=plain, s=scale: p(w).view(np.int32).astype(np.int64).view(np.uint64) * s)  # type: ignore[misc]
    return lambda w: sum((read(w) for read in readers[1:]), readers[0](w))


def _access(one: Instruction, banks: Banks, memory: Memory, wavefronts: Callable[[int, int], None]) -> Step:
    name, mods, where = one.mnemonic, one.op.split(".")[1:], where_of(one)
    is_atomic, is_load = name == "ATOMS", name in _LOADS
    space = "shared" if is_atomic else {**_LOADS, **_STORES}[name]
    place = next(text for text in one.operands if text.endswith("]") and "[" in text)
    address = _address(place, banks)
    size = next((n for m, n in _SIZES.items() if m in mods), 4)
    others = [text for text in one.operands if text is not place]
    row = register_row(others[0])
    data = register_row(others[-1])

    def run(w: State) -> None:
        lanes = where(w)
        if lanes is not None and not lanes.any():
            return
        at = address(w) if lanes is None else address(w)[lanes]
        array, words, is_shared = memory.words(at, space)
        wavefronts(memory.note(at, size, is_shared, not is_load), max(size // 4, 1))
        if is_atomic:
            added = np.uint32(1) if "POPC" in mods else w.registers[data] if lanes is None else w.registers[data][lanes]
            before = array[words]
            np.add.at(array, words, added)
            _keep(w, row, before, lanes)
        elif is_load:
            for n in range(max(size // 4, 1)):
                taken = array[words + n]
                if size < 4:
                    narrow = taken >> ((at & np.uint64(3)) * np.uint64(8)).astype(np.uint32)
                    kind = _KINDS[next(m for m in mods if m in _KINDS)]
                    taken = narrow.astype(f"<u{size}").view(kind).astype(np.int32).view(np.uint32)
                _keep(w, row + n, taken, lanes)
        elif size < 4:
            raise IndexError
        else:
            for n in range(size // 4):
                given = w.registers[data if data == ZERO else data + n]
                array[words + n] = given if lanes is None else given[lanes]

    return run


_SIZES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def _keep(w: State, row: int, value: np.ndarray, lanes: np.ndarray | None) -> None:
    if row != ZERO:
        if lanes is None:
            w.registers[row] = value
        else:
            w.registers[row][lanes] = value


def _shuffle(one: Instruction, banks: Banks) -> Step:
    flag, to, source, by, _ = one.operands
    row, out, where, kind = register_row(to), predicate(flag)[0], where_of(one), one.op.split(".")[1]
    value, distance, lane = read_int(source, banks), read_int(by, banks), np.arange(LANES)

    def run(w: State) -> None:
        apart = distance(w).astype(np.int64)
        wanted = {"BFLY": lane ^ apart, "IDX": apart, "DOWN": lane + apart, "UP": lane - apart}[kind]
        inside = (wanted >= 0) & (wanted < LANES)
        lanes = where(w)
        write_rows(w, row, value(w)[np.where(inside, wanted, lane)], lanes)
        write_predicate(w, out, inside, lanes)

    return run


def _all_predicates(one: Instruction, banks: Banks) -> Step:
    given, where = one.operands, where_of(one)
    if one.mnemonic == "P2R":
        row, mask, bits = register_row(given[0]), int(given[3], 16), np.uint32(1) << np.arange(7, dtype=np.uint32)
        before = read_int(given[2], banks)

        def pack(w: State) -> None:
            packed = (w.predicates[:7] * bits[:, None]).sum(0).astype(np.uint32)
            write_rows(w, row, packed & np.uint32(mask) | before(w) & np.uint32(~mask & 0xFFFFFFFF), where(w))

        return pack
    source, mask = read_int(given[1], banks), int(given[2], 16)

    def unpack(w: State) -> None:
        for n in range(7):
            if mask >> n & 1:
                write_predicate(w, n, (source(w) >> np.uint32(n) & np.uint32(1)) != 0, where(w))

    return unpack
