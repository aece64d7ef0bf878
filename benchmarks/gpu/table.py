"""The CSV file of compiled variants, the promises about them, and their tables in Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from .compiled import CLASSES, Compiled

MOST_SECONDS = 20.0
REGISTER_CLASSES = 16
REGISTER_ARCHITECTURES = ("sm_80", "sm_90")
_PLAIN = tuple(field.name for field in fields(Compiled) if field.name != "static")
COLUMNS = (*_PLAIN, *(f"n_{name}" for name in CLASSES), "instructions", "triton")


@dataclass(frozen=True)
class Verdict:
    """A promise and whether it holds: None where no variant that it speaks of was compiled."""

    promise: str
    kept: bool | None
    figure: str


def write_csv(path: Path, compiled: Iterable[Compiled], triton: str) -> None:
    """Write a row for every variant, in the order given.

    Args:
        path: the file; its folder is made.
        compiled: the rows.
        triton: version of triton, the same in all rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for one in compiled:
            row: dict[str, object] = {name: getattr(one, name) for name in _PLAIN}
            row |= {n: f"{getattr(one, n):.3f}" for n in ("occupancy", "seconds", "cpu_seconds")}
            row |= {f"n_{name}": (one.static or {}).get(name, 0) for name in CLASSES}
            writer.writerow({**row, "instructions": one.instructions, "triton": triton})


def read_csv(path: Path) -> tuple[list[Compiled], str]:
    """Read what `write_csv` wrote: the rows, and the version of triton.

    Raises:
        ValueError: it is not such a file.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(COLUMNS) - set(rows[0]):
        raise ValueError(
            f"{path}: got other columns, expected a file written by python -m benchmarks.gpu; run it again"
        )
    kinds = {field.name: str(field.type) for field in fields(Compiled)}
    made = {"int": int, "float": float, "str": str}
    found = []
    for row in rows:
        known = {name: made[kinds[name]](row[name]) for name in _PLAIN}
        static = {name: int(row[f"n_{name}"]) for name in CLASSES}
        found.append(Compiled(**known, static=static))  # type: ignore[arg-type]
    return found, rows[0]["triton"]


def judge(compiled: Sequence[Compiled]) -> list[Verdict]:
    """Every promise about what the compilers make, judged on these variants."""
    failed = [c for c in compiled if c.error]
    fine = [c for c in compiled if not c.error]
    few = [c for c in fine if c.arch in REGISTER_ARCHITECTURES and c.classes <= REGISTER_CLASSES]
    spilled = [c for c in few if c.spilled]
    slow = [c for c in fine if c.cpu_seconds >= MOST_SECONDS]
    slowest = max(fine, key=lambda c: c.cpu_seconds, default=None)
    return [
        Verdict(
            "every variant compiles",
            not failed if compiled else None,
            f"{len(fine)} of {len(compiled)}" + "".join(f"; {name(c)}: {c.error}" for c in failed),
        ),
        Verdict(
            f"no spill to memory at C <= {REGISTER_CLASSES} on {' and '.join(REGISTER_ARCHITECTURES)}",
            not spilled if few else None,
            f"{len(few) - len(spilled)} of {len(few)} variants without"
            + "".join(f"; {name(c)}: {c.spills} loads and stores, {c.stack_bytes} bytes" for c in spilled),
        ),
        Verdict(
            f"each variant compiles in less than {MOST_SECONDS:.0f} s",
            not slow if fine else None,
            (f"slowest {slowest.cpu_seconds:.1f} s, {name(slowest)}" if slowest else "none compiled")
            + f"; longest wait {max((c.seconds for c in fine), default=0):.1f} s by the clock, with whatever else ran"
            + "".join(f"; {name(c)}: {c.cpu_seconds:.1f} s" for c in slow if c is not slowest),
        ),
    ]


def name(one: Compiled) -> str:
    """A variant in words."""
    return f"{one.kernel} {one.arch} C={one.classes} {one.dims}D"


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table whose first `left` columns are words, the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, rule, *lines))


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """The promises with their figures."""
    word = {True: "kept", False: "**broken**", None: "not judged"}
    return markdown(["", "promise", "figure"], [[word[v.kept], v.promise, v.figure] for v in verdicts], left=3)


def register_table(compiled: Sequence[Compiled], kernel: str) -> str:
    """Registers, spills and programs of one kernel: a line for each architecture and number of axes."""
    chosen = [c for c in compiled if c.kernel == kernel]
    counts = sorted({c.classes for c in chosen})
    lines = []
    for arch in dict.fromkeys(c.arch for c in chosen):
        for dims in sorted({c.dims for c in chosen}):
            at = {c.classes: c for c in chosen if c.arch == arch and c.dims == dims}
            if at:
                lines.append([arch, f"{dims}D", *(_cell(at[n]) if n in at else "" for n in counts)])
    header = ["", "", *(f"C={n}" for n in counts)] if kernel != "gather" else ["", "", "any C"]
    return markdown(header, lines, left=2)


def _cell(one: Compiled) -> str:
    if one.error:
        return "failed"
    text = f"{one.registers} ({one.programs})"
    if one.spilled:
        text += f" **{one.spills} sp, {one.stack_bytes} B**"
    return text + (f" {one.scalar_spills}s" if one.scalar_spills else "")


def class_table(compiled: Sequence[Compiled], classes: int) -> str:
    """Static instructions by class of the variants with so many classes, 2D and 3D."""
    chosen = [c for c in compiled if not c.error and (c.classes == classes or c.kernel == "gather")]
    shown = [n for n in CLASSES if any((c.static or {}).get(n) for c in chosen)]
    lines = [
        [f"{c.kernel} {c.arch} {c.dims}D", c.instructions, *((c.static or {}).get(n, 0) for n in shown)] for c in chosen
    ]
    return markdown(["", "all", *(n.replace("_", " ") for n in shown)], lines)


def shape_table(compiled: Sequence[Compiled]) -> str:
    """For each kernel and architecture the ranges of what the other tables leave out."""
    lines = []
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for c in compiled:
        if not c.error:
            groups.setdefault((c.kernel, c.arch), []).append(c)
    for (kernel, arch), group in groups.items():
        lines.append(
            [
                f"{kernel} {arch}",
                _range([c.shared_bytes for c in group]),
                _range([round(100 * c.occupancy) for c in group]) + " %",
                _range([c.instructions for c in group]),
                f"{min(c.cpu_seconds for c in group):.1f} - {max(c.cpu_seconds for c in group):.1f}",
            ]
        )
    return markdown(["", "shared bytes", "occupancy", "instructions", "seconds to compile"], lines)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} - {high}"
