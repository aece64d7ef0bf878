"""Operands of machine code: registers of 32 lanes, constants and predicates, read and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[np.generic]
LANES = 32
UNIFORM, ZERO, TRUE = 256, 255, 7  # row of UR0 among the registers, of RZ, of PT among the predicates
ROWS, PREDICATES = 320, 16
_REGISTER = re.compile(r"^(U?)R(\d+|Z)$")
_PREDICATE = re.compile(r"^(!?)(U?)P(\d|T)$")
_CONSTANT = re.compile(r"^c\[(0x[0-9a-f]+)\]\[(?:(U?R(?:\d+|Z)))?\+?(-?0x[0-9a-f]+)?\]$")
_SPECIAL = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "INF": np.inf, "QNAN": np.nan}


class State(Protocol):
    """What a warp holds: registers [ROWS, 32], predicates [PREDICATES, 32]; lanes that run now, and whether all do."""

    registers: npt.NDArray[np.uint32]
    predicates: npt.NDArray[np.bool_]
    mask: npt.NDArray[np.bool_]
    full: bool


Reader = Callable[[State], Lanes]


def register_row(text: str) -> int:
    """Row of a register such as "R12", "UR4" or "RZ.64".

    Raises:
        ValueError: it is none.
    """
    found = _REGISTER.match(text.partition(".")[0])
    if not found:
        raise ValueError(f"operand: got {text!r}, expected a register; teach cuda_values.py about it")
    uniform = UNIFORM if found[1] else 0
    return uniform + (63 if uniform else ZERO) if found[2] == "Z" else uniform + int(found[2])


def predicate(text: str) -> tuple[int, bool]:
    """Row of a predicate such as "!P3" or "UPT", and whether it is negated.

    Raises:
        ValueError: it is none.
    """
    found = _PREDICATE.match(text)
    if not found:
        raise ValueError(f"operand: got {text!r}, expected a predicate; teach cuda_values.py about it")
    return (8 if found[2] else 0) + (TRUE if found[3] == "T" else int(found[3])), found[1] == "!"


def is_predicate(text: str) -> bool:
    """Whether an operand is a predicate."""
    return bool(_PREDICATE.match(text))


def read_predicate(text: str) -> Callable[[State], npt.NDArray[np.bool_]]:
    """Reader of a predicate."""
    row, negated = predicate(text)
    return (lambda w: ~w.predicates[row]) if negated else (lambda w: w.predicates[row])


def constant_of(text: str, banks: dict[int, bytes]) -> tuple[int, int | None, int] | None:
    """Bank, register row or None, and offset of an operand such as "c[0x0][R3+0x10]"; None for other operands."""
    found = _CONSTANT.match(text)
    if not found:
        return None
    bank = int(found[1], 16)
    if bank not in banks:
        raise ValueError(f"operand: got {text!r}, expected a constant bank out of {sorted(banks)}")
    return bank, register_row(found[2]) if found[2] else None, int(found[3] or "0", 16)


def read_int(text: str, banks: dict[int, bytes]) -> Reader:
    """Reader of 32 bits as uint32, with - and ~ applied."""
    return _reader(text, banks, is_float=False, wide=False)


def read_wide(text: str, banks: dict[int, bytes]) -> Reader:
    """Reader of a pair of registers, or of 64 bits of constants, as uint64."""
    return _reader(text, banks, is_float=False, wide=True)


def read_float(text: str, banks: dict[int, bytes]) -> Reader:
    """Reader of 32 bits as float32, with - and absolute value applied."""
    return _reader(text, banks, is_float=True, wide=False)


def _reader(text: str, banks: dict[int, bytes], is_float: bool, wide: bool) -> Reader:
    sign, inner = "", text.removesuffix(".reuse").strip()
    if inner[0] in "-~" and not re.match(r"-(\d|INF|QNAN)", inner):
        sign, inner = inner[0], inner[1:]
    absolute = inner.startswith("|")
    inner = inner.strip("|").removesuffix(".reuse").strip("|")
    plain = _plain(inner, banks, is_float, wide)
    if absolute:
        return (lambda w: -np.abs(plain(w))) if sign else (lambda w: np.abs(plain(w)))
    if sign == "~":
        return lambda w: ~plain(w)
    return (lambda w: -plain(w)) if sign else plain  # unsigned numbers wrap


def _plain(text: str, banks: dict[int, bytes], is_float: bool, wide: bool) -> Reader:
    if _REGISTER.match(text.partition(".")[0]):
        row = register_row(text)
        if wide:
            if row in (ZERO, UNIFORM + 63):
                return lambda w: np.zeros(LANES, np.uint64)
            return lambda w: (
                w.registers[row].astype(np.uint64) | w.registers[row + 1].astype(np.uint64) << np.uint64(32)
            )
        return (lambda w: w.registers[row].view(np.float32)) if is_float else (lambda w: w.registers[row])
    place = constant_of(text, banks)
    if place:
        bank, row, offset = place
        if row is not None:
            raise ValueError(f"operand: got {text!r}, expected a constant at a fixed place; only LDC takes others")
        raw = banks[bank][offset : offset + (8 if wide else 4)]
        value: Lanes = np.repeat(np.frombuffer(raw, np.uint64 if wide else np.uint32), LANES)
        found = value.view(np.float32) if is_float else value
        return lambda w: found
    fixed = _immediate(text, is_float, wide)
    return lambda w: fixed


def _immediate(text: str, is_float: bool, wide: bool) -> Lanes:
    if text in _SPECIAL:
        number = np.float32(_SPECIAL[text])
    elif is_float and not text.lstrip("-").startswith("0x"):
        number = np.float32(float(text))
    else:
        kind = np.uint64 if wide else np.uint32
        return np.full(LANES, int(text, 0) & (2**64 - 1 if wide else 2**32 - 1), kind)
    lanes = np.full(LANES, number, np.float32)
    return lanes if is_float else lanes.view(np.uint32)


def write_rows(w: State, row: int, value: Lanes, where: npt.NDArray[np.bool_] | None) -> None:
    """Write 32 bits of each lane, or 64 to two rows, where lanes run; nothing into RZ."""
    if row in (ZERO, UNIFORM + 63):
        return
    if value.dtype.itemsize == 8:
        bits = value.view(np.uint64)
        write_rows(w, row, bits.astype(np.uint32), where)
        write_rows(w, row + 1, (bits >> np.uint64(32)).astype(np.uint32), where)
    elif where is None:
        w.registers[row] = value.view(np.uint32)
    else:
        np.copyto(w.registers[row], value.view(np.uint32), where=where)


def write_predicate(w: State, row: int, value: npt.NDArray[np.bool_], where: npt.NDArray[np.bool_] | None) -> None:
    """Write a predicate where lanes run; nothing into PT."""
    if row % 8 == TRUE:
        return
    if where is None:
        w.predicates[row] = value
    else:
        np.copyto(w.predicates[row], value, where=where)
