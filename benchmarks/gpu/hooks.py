"""Operations that a kernel executes in Triton's interpreter, counted by kind.

Two numbers of everything: elements, and instructions of whole warps. A tensor smaller than a program is held by all of
its threads, so that each of its warps executes the instruction: a scalar costs as much as 128 elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

LINE = 128  # bytes that a core's load and store unit takes a clock, and that one wavefront covers
_LANES = 32
_ARITHMETIC = {np.add, np.subtract, np.multiply, np.negative}
_SPECIAL = {np.exp: "exp", np.exp2: "exp", np.log: "log", np.log2: "log"}
_CHOICE = {np.minimum, np.maximum, np.fmin, np.fmax}
_COMPARISON = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


class Counts:
    """What has been executed so far.

    Args:
        threads: of a program.

    Attributes:
        elements, warps: by kind: "float" (of which "fused": a product that goes into a sum, one instruction), "choice"
            (comparison, minimum, select of floats), "exp", "log", "divide", "convert", "integer", "address",
            "load_<where>" and "store_<where>", "shuffle", "macs" (multiply-adds of matrix products; their "warps" are
            the instructions that would do them without matrix units).
        wavefronts: of loads and stores by the same names: distinct 128-byte lines for each 32 consecutive elements.
        bytes: of loads and stores by the same names, and of operands of matrix products as "operands".
        touched: bytes of scratch lines that were ever read or written.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.elements: Counter[str] = Counter()
        self.warps: Counter[str] = Counter()
        self.wavefronts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._ranges: list[tuple[int, int, str]] = []
        self._lines: np.ndarray = np.zeros(0, bool)

    @property
    def touched(self) -> int:
        return int(self._lines.sum()) * LINE

    def place(self, where: str, start: int, size: int) -> None:
        """Say what lies in memory: `size` bytes from address `start`; where: "scratch", "images" or "tables"."""
        self._ranges.append((start, start + size, where))
        if where == "scratch":
            self._lines = np.zeros(size // LINE + 2, bool)

    def add(self, kind: str, size: int, each: float = 1.0) -> None:
        """Count one operation on a tensor of `size` elements, `each` instructions for an element."""
        self.elements[kind] += size
        self.warps[kind] += max(size, self.threads) / _LANES * each

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, width: int) -> None:
        """Count a load or a store; width: bytes of an element."""
        size = pointers.size
        start, where = self._where(pointers, mask)
        if size == 1:  # one address for a whole warp
            where = "scalars"
        name = f"{kind}_{where}"
        # From where the tensor starts: a GPU's memory is aligned to whole lines, that of the host need not be.
        flat = pointers.ravel().astype(np.int64) - start
        run = size >= self.threads and bool((np.diff(flat) == width).all())
        vector = min(16 // width, max(1, size // self.threads)) if run else 1
        self.add(name, size, 1 / vector)
        taken = np.broadcast_to(mask, pointers.shape).ravel()
        self.bytes[name] += int(taken.sum()) * width
        lines = flat // LINE + 1  # 0 stands for a lane that is masked off
        if where == "scratch" and taken.any():
            self._lines[lines[taken]] = True
        if size < self.threads:
            self.wavefronts[name] += self.threads // _LANES if taken.any() else 0
            return
        ordered = np.sort(np.where(taken, lines, 0).reshape(-1, _LANES), axis=1)
        new = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] != 0)
        self.wavefronts[name] += int(new.sum() + (ordered[:, 0] != 0).sum())

    def _where(self, pointers: np.ndarray, mask: np.ndarray) -> tuple[int, str]:
        """Start and name of the tensor that is read or written."""
        taken = pointers[np.broadcast_to(mask, pointers.shape)]
        one = int(taken.flat[0]) if taken.size else 0
        return next(((start, where) for start, end, where in self._ranges if start <= one < end), (0, "tables"))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        parts = {name: dict(getattr(self, name)) for name in ("elements", "warps", "wavefronts", "bytes")}
        return {**parts, "touched": self.touched}


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count whatever the interpreter executes inside of the block."""
    from triton.runtime import interpreter

    builder, reduce = interpreter.InterpreterBuilder, interpreter.ReduceOps
    wrapped: list[tuple[type, str, Callable[..., Any]]] = []

    def wrap(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        before = getattr(owner, name)
        wrapped.append((owner, name, before))
        setattr(owner, name, make(before))

    makers = _makers(counts)
    for name, make in makers.items():
        wrap(reduce if name == "apply_impl" else builder, name, make)
    try:
        yield
    finally:
        for owner, name, before in wrapped:
            setattr(owner, name, before)


def _makers(counts: Counts) -> dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """What replaces each method of the interpreter: it counts, then does the same."""

    def binary(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
            out = before(self, lhs, rhs, op)
            size = out.data.size
            if lhs.data.dtype.kind != "f":
                counts.add("integer", size)
            elif op in _COMPARISON or op in _CHOICE:
                counts.add("choice", size)
            elif op is np.divide:
                counts.add("divide", size)
            else:
                counts.add("float" if op in _ARITHMETIC else "integer", size)
                _fuse(counts, lhs, rhs, out, op, size)
            return out

        return run

    def unary(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, arg: Any, op: Any) -> Any:
            kind = _SPECIAL.get(op) or ("float" if arg.data.dtype.kind == "f" else "integer")
            counts.add(kind, arg.data.size)
            return before(self, arg, op)

        return run

    def ternary(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
            out = before(self, lhs, rhs, other, op)
            counts.add("choice" if out.data.dtype.kind == "f" else "integer", out.data.size)
            return out

        return run

    def cast(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, src: Any, dst: Any) -> Any:
            out = before(self, src, dst)
            if out.data.dtype != src.data.dtype:
                floats = "f" in (out.data.dtype.kind, src.data.dtype.kind)
                counts.add("convert" if floats else "integer", out.data.size)
            return out

        return run

    def load(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            out = before(self, ptrs, mask, *rest)
            counts.access("load", ptrs.data, mask.data, out.data.itemsize)
            return out

        return run

    def store(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            counts.access("store", ptrs.data, mask.data, value.data.itemsize)
            return before(self, ptrs, value, mask, *rest)

        return run

    def dot(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            counts.add("macs", a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
            counts.bytes["operands"] += a.data.nbytes + b.data.nbytes
            return before(self, a, b, d, *rest)

        return run

    def plain(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(before: Callable[..., Any]) -> Callable[..., Any]:
            def run(self: Any, *operands: Any) -> Any:
                out = before(self, *operands)
                counts.add(kind, out.data.size)
                return out

            return run

        return make

    def reduce(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, given: Any) -> Any:
            for one in given:
                data = one.handle.data
                # Each thread adds what it has, then log2(32) exchanges in every warp, each with an addition.
                warps = counts.threads // _LANES
                counts.elements["shuffle"] += data.size
                counts.warps["shuffle"] += 5 * warps
                kind = "float" if data.dtype.kind == "f" else "integer"
                counts.elements[kind] += data.size
                counts.warps[kind] += max(data.size / counts.threads - 1, 0) * warps + 5 * warps
            return before(self, given)

        return run

    return {
        **{"binary_op": binary, "unary_op": unary, "ternary_op": ternary, "cast_impl": cast, "create_dot": dot},
        **{"create_masked_load": load, "create_masked_store": store, "apply_impl": reduce},
        **{"create_idiv": plain("integer"), "create_addptr": plain("address"), "create_fma": plain("float")},
    }


def _fuse(counts: Counts, lhs: Any, rhs: Any, out: Any, op: Any, size: int) -> None:
    """Mark products, and count those that a sum takes in: a compiler makes one instruction of the two."""
    if op is np.multiply:
        out.attr["product"] = True
    elif op in (np.add, np.subtract):
        for one in (lhs, rhs):
            if one.attr.pop("product", False):
                counts.add("fused", size)
                break
