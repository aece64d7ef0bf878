"""What integer, move and predicate instructions do, as nvdisasm writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .cuda_values import LANES, Lanes, Reader, State, is_predicate, read_int, read_predicate, read_wide

# An instruction's results, in the order of its destinations, from the warp's state.
Results = Callable[[State], Sequence[Lanes]]
Banks = dict[int, bytes]
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def signed(value: Lanes) -> npt.NDArray[np.int64]:
    """32 bits as signed numbers that do not overflow."""
    return value.view(np.int32).astype(np.int64)


def _wide(value: Lanes) -> npt.NDArray[np.uint64]:
    return value.astype(np.uint64)


def _summand(text: str, banks: Banks) -> Reader:
    """An addend of 33 bits: -b is ~b + 1, whose carry counts also where b is 0."""
    if text.startswith("-") and not text.startswith("-0x"):
        plain = read_int(text[1:], banks)
        return lambda w: _wide(~plain(w)) + np.uint64(1)
    plain = read_int(text, banks)
    return lambda w: _wide(plain(w))


def add3(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """IADD3, with one carry out for each of `outs` - 1 predicates, and carries in for .X."""
    numbers = [_summand(one, banks) for one in given if not is_predicate(one)]
    carries = [read_predicate(one) for one in given if is_predicate(one)]

    def run(w: State) -> Sequence[Lanes]:
        total = sum((one(w) for one in numbers), np.zeros(LANES, np.uint64))
        for carry in carries:
            total = total + carry(w)
        return [total.astype(np.uint32), *(total >> _32 > np.uint64(n) for n in range(outs - 1))]

    return run


def multiply_add(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """IMAD with its many modifiers."""
    mods = op.split(".")[1:]
    is_signed = "U32" not in mods
    a, b = read_int(given[0], banks), read_int(given[1], banks)
    wide = "WIDE" in mods or "HI" in mods
    c = read_wide(given[2], banks) if wide else _summand(given[2], banks)
    carry = read_predicate(given[3]) if len(given) > 3 else None

    def run(w: State) -> Sequence[Lanes]:
        product = (signed(a(w)) * signed(b(w))).view(np.uint64) if is_signed else _wide(a(w)) * _wide(b(w))
        if not wide and outs > 1:
            product = product & _LOW
        total = product + c(w)
        if carry is not None:
            total = total + carry(w)
        if not wide:
            return [total.astype(np.uint32), total >> _32 != 0][:outs]
        high = [(total >> _32).astype(np.uint32)] if "HI" in mods else [total]
        return [*high, total < product][:outs]

    return run


def shift_add(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """LEA: a << s, or its high half, plus b."""
    mods = op.split(".")[1:]
    numbers = [one for one in given if not is_predicate(one)]
    carry = next((read_predicate(one) for one in given if is_predicate(one)), None)
    a, b = read_int(numbers[0], banks), _summand(numbers[1], banks)
    shift = np.uint64(int(numbers[-1], 16))
    upper = read_int(numbers[2], banks) if len(numbers) == 4 else None

    def run(w: State) -> Sequence[Lanes]:
        value = a(w)
        if "SX32" in mods:
            whole = signed(value).view(np.uint64)
        else:
            whole = _wide(value) | (_wide(upper(w)) << _32 if upper else np.uint64(0))
        shifted = whole << shift
        total = ((shifted >> _32 if "HI" in mods else shifted) & _LOW) + b(w)
        if carry is not None:
            total = total + carry(w)
        return [total.astype(np.uint32), total >> _32 != 0][:outs]

    return run


def shift(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """SHF: a shift of the 64 bits {third, first}, of which half is kept."""
    mods = op.split(".")[1:]
    low, by, high = (read_int(one, banks) for one in given[:3])
    is_signed = mods[1].startswith("S")

    def run(w: State) -> Sequence[Lanes]:
        whole = _wide(low(w)) | _wide(high(w)) << _32
        count = _wide(by(w))
        count = count & np.uint64(31) if "W" in mods else np.minimum(count, np.uint64(63))
        if mods[0] == "L":
            moved = whole << count
        elif is_signed:
            moved = (whole.view(np.int64) >> count.view(np.int64)).view(np.uint64)
        else:
            moved = whole >> count
        return [(moved >> _32 if "HI" in mods else moved).astype(np.uint32)]

    return run


def table_of(lut: int, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """A logic function of three, bit by bit: bit 4a + 2b + c of `lut`."""
    found = np.zeros_like(a)
    for case in range(8):
        if lut >> case & 1:
            found |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return found


def logic(op: str, outs: int, given: Sequence[str], banks: Banks, flag_first: bool) -> Results:
    """LOP3, whose predicate comes first and says whether a bit is set."""
    a, b, c = (read_int(one, banks) for one in given[:3])
    lut = int(given[3], 16)

    def run(w: State) -> Sequence[Lanes]:
        found = table_of(lut, a(w), b(w), c(w))
        return [found != 0, found] if flag_first else [found]

    return run


def predicate_logic(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """PLOP3: two functions of three predicates."""
    a, b, c = (read_predicate(one) for one in given[:3])
    luts = [int(one, 16) for one in given[3:5]]
    return lambda w: [table_of(lut, a(w), b(w), c(w)) for lut in luts]


_COMPARE: dict[str, Callable[[Lanes, Lanes], npt.NDArray[np.bool_]]] = {
    "GE": np.greater_equal,
    "GT": np.greater,
    "LE": np.less_equal,
    "LT": np.less,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_STRICT = {"GE": "GT", "LE": "LT", "GT": "GT", "LT": "LT"}


def compared(op: str, a: Callable[[State], Lanes], b: Callable[[State], Lanes], rest: Sequence[str]) -> Results:
    """A comparison combined with a predicate; for .EX of high halves, whose low halves were compared before."""
    mods = op.split(".")[1:]
    unordered = mods[0].endswith("U") and mods[0] not in _COMPARE
    name = mods[0].removesuffix("U") if unordered else mods[0]
    join = np.logical_or if "OR" in mods else np.logical_xor if "XOR" in mods else np.logical_and
    other = read_predicate(rest[0])
    low = read_predicate(rest[1]) if "EX" in mods else None

    def run(w: State) -> Sequence[Lanes]:
        x, y = a(w), b(w)
        if low is None:
            holds = _COMPARE[name](x, y)
            if unordered:
                holds = holds | np.isnan(x) | np.isnan(y)
        elif name == "NE":
            holds = (x != y) | low(w)
        elif name == "EQ":
            holds = (x == y) & low(w)
        else:
            holds = _COMPARE[_STRICT[name]](x, y) | ((x == y) & low(w))
        return [join(holds, other(w)), join(~holds, other(w))]

    return run


def compare(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """ISETP."""
    a, b = (read_int(one, banks) for one in given[:2])
    if "U32" in op:
        return compared(op, a, b, given[2:])
    return compared(op, lambda w: signed(a(w)), lambda w: signed(b(w)), given[2:])


def extreme(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """IMNMX, VIMNMX and, of a sum, VIADDMNMX: the smaller where the predicate holds."""
    numbers, is_least = [read_int(one, banks) for one in given[:-1]], read_predicate(given[-1])
    kind = (lambda x: x) if "U32" in op else signed

    def run(w: State) -> Sequence[Lanes]:
        values = [one(w) for one in numbers]
        first = values[0] if len(values) == 2 else values[0] + values[1]
        x, y = kind(first), kind(values[-1])
        best = np.where(is_least(w), np.minimum(x, y), np.maximum(x, y))
        return [(np.maximum(best, 0) if "RELU" in op else best).astype(np.int64).astype(np.uint32)]

    return run


def permute(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """PRMT: four bytes chosen out of eight."""
    a, selector, b = (read_int(one, banks) for one in given[:3])

    def run(w: State) -> Sequence[Lanes]:
        whole, chosen = _wide(a(w)) | _wide(b(w)) << _32, _wide(selector(w))
        found = np.zeros(LANES, np.uint64)
        for byte in range(4):
            which = chosen >> np.uint64(4 * byte) & np.uint64(15)
            value = whole >> (which & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(value >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
            found |= np.where(which >= 8, sign, value) << np.uint64(8 * byte)
        return [found.astype(np.uint32)]

    return run


def leading_zeros(value: Lanes) -> npt.NDArray[np.uint32]:
    """Zero bits before the first one of 32; all ones where there is none, as FLO.SH has it."""
    length = np.frexp(value.astype(np.float64))[1]
    return np.where(value == 0, np.uint32(0xFFFFFFFF), (32 - length).astype(np.uint32)).astype(np.uint32)


def one_operand(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """MOV, IABS, POPC, BREV, FLO.SH."""
    a = read_int(given[0], banks)
    mnemonic = {"UMOV": "MOV", "R2UR": "MOV"}.get(op.partition(".")[0], op.partition(".")[0])
    if mnemonic == "FLO" and not op.endswith("U32.SH"):
        raise ValueError(f"op: got {op}, expected FLO.U32.SH; teach cuda_integers.py about it")
    actions: dict[str, Callable[[Lanes], Lanes]] = {
        "MOV": lambda x: x,
        "IABS": lambda x: np.abs(signed(x)).astype(np.uint32),
        "POPC": lambda x: _bits(x).sum(1).astype(np.uint32),
        "BREV": lambda x: np.packbits(_bits(x), axis=1, bitorder="little").view(np.uint32)[:, 0],
        "FLO": leading_zeros,
    }
    action = actions[mnemonic]
    return lambda w: [action(a(w))]


def _bits(value: Lanes) -> npt.NDArray[np.uint8]:
    """[32 lanes, 32 bits], the highest first."""
    return np.unpackbits(value.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)


def select(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """SEL."""
    a, b = (read_int(one, banks) for one in given[:2])
    chosen = read_predicate(given[2])
    return lambda w: [np.where(chosen(w), a(w), b(w))]
