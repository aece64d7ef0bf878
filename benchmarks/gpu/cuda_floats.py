"""What floating point instructions and conversions do, as nvdisasm writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .cuda_integers import Banks, Results, compared, signed
from .cuda_values import LANES, Lanes, State, read_float, read_int, read_predicate, read_wide

Floats = npt.NDArray[np.float32]


def arithmetic(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """FADD, FMUL, FFMA; a product is not rounded before it is added."""
    numbers = [read_float(one, banks) for one in given]
    mnemonic = op.partition(".")[0]
    if mnemonic == "FFMA":
        a, b, c = numbers
        return lambda w: [(a(w).astype(np.float64) * b(w) + c(w)).astype(np.float32)]
    x, y = numbers[:2]
    return (lambda w: [x(w) + y(w)]) if mnemonic == "FADD" else (lambda w: [x(w) * y(w)])


def extreme(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """FMNMX: the smaller where the predicate holds."""
    a, b = (read_float(one, banks) for one in given[:2])
    is_least = read_predicate(given[2])
    return lambda w: [np.where(is_least(w), np.fmin(a(w), b(w)), np.fmax(a(w), b(w)))]


def select(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """FSEL."""
    a, b = (read_float(one, banks) for one in given[:2])
    chosen = read_predicate(given[2])
    return lambda w: [np.where(chosen(w), a(w), b(w))]


def compare(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """FSETP."""
    a, b = (read_float(one, banks) for one in given[:2])
    return compared(op, a, b, given[2:])


def needs_slow_path(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """FCHK: whether a quotient is out of the ordinary, which those of our kernels are not."""
    return lambda w: [np.zeros(LANES, bool)]


_FUNCTIONS: dict[str, Callable[[Floats], Floats]] = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": np.reciprocal,
    "RSQ": lambda x: np.float32(1) / np.sqrt(x),
}


def special(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """MUFU."""
    a, function = read_float(given[0], banks), _FUNCTIONS[op.split(".")[1]]
    return lambda w: [function(a(w))]


def halves(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """HFMA2 as it is used to make a constant: both products are 0, the high half comes first."""
    if [one.strip("-") for one in given[:2]] != ["RZ", "RZ"]:
        raise ValueError(f"operands: got {given} of {op}, expected RZ twice; teach cuda_floats.py about arithmetic")
    made = np.array([float(given[3]), float(given[2])], np.float16).view(np.uint32)
    value = np.repeat(made, LANES)
    return lambda w: [value]


def widened(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """HADD2.F32: half of a register from float16 to float32."""
    a, shift = read_int(given[1].partition(".")[0], banks), 16 if "H1" in given[1] else 0
    return lambda w: [(a(w) >> np.uint32(shift)).astype(np.uint16).view(np.float16).astype(np.float32)]


def from_integer(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """I2F and I2FP."""
    mods = op.split(".")[1:]
    if "S64" in mods or "U64" in mods:
        wide = read_wide(given[0], banks)
        number: Callable[[State], Lanes] = (lambda w: wide(w).view(np.int64)) if "S64" in mods else wide
    else:
        plain = read_int(given[0], banks)
        number = plain if "U32" in mods else (lambda w: signed(plain(w)))

    def run(w: State) -> Sequence[Lanes]:
        exact = number(w).astype(np.float64)
        value = exact.astype(np.float32)
        if "RP" in mods:
            value = np.where(value < exact, np.nextafter(value, np.float32(np.inf)), value)
        return [value]

    return run


def to_integer(op: str, outs: int, given: Sequence[str], banks: Banks) -> Results:
    """F2I."""
    mods = op.split(".")[1:]
    a = read_float(given[0], banks)
    rounding = np.ceil if "CEIL" in mods else np.floor if "FLOOR" in mods else np.trunc if "TRUNC" in mods else np.rint

    def run(w: State) -> Sequence[Lanes]:
        value = rounding(a(w).astype(np.float64))
        if "U64" in mods:
            return [np.clip(value, 0, 2.0**63).astype(np.uint64)]
        if "U32" in mods:
            return [np.clip(value, 0, 2.0**32 - 1).astype(np.uint32)]
        return [np.clip(value, -(2.0**31), 2.0**31 - 1).astype(np.int32)]

    return run
