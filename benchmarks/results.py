"""Rows of the CSV file: every figure with the machine, the versions and the commit it came from."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from lomix_fast.demo.environment import environment
from lomix_fast.testing.cases import Case

from .measure import Measurement

FOLDER = Path(__file__).resolve().parent / "results"
COLUMNS = (
    *("case", "contender", "B", "C", "L", "spatial", "native_scales", "dtype", "direction"),
    *("p20_ms", "p50_ms", "p80_ms", "n", "extra_peak_mib"),
    *("threads", "cores", "cpu_model", "capability", "torch", "triton", "python", "lomix_fast", "commit", "date"),
)


def machine(threads: int) -> dict[str, object]:
    """The columns that are the same in all rows of a run."""
    here = environment()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "threads": threads,
        "cores": here["cores"],
        "cpu_model": here["cpu"],
        "capability": here["cpu_capability"],
        "torch": here["torch"],
        "triton": triton,
        "python": here["python"],
        "lomix_fast": here["package"],
        "commit": here["commit"] or "",
        "date": here["date"],
    }


def row(measurement: Measurement, common: dict[str, object]) -> dict[str, object]:
    """One line of the file."""
    case = measurement.case
    return {
        "case": case.name,
        "contender": measurement.contender,
        "B": case.batch,
        "C": case.classes,
        "L": len(case.native),
        "spatial": size_text(case.full),
        "native_scales": " ".join(map(size_text, case.native)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": measurement.direction,
        "p20_ms": _number(measurement.p20_ms),
        "p50_ms": _number(measurement.p50_ms),
        "p80_ms": _number(measurement.p80_ms),
        "n": measurement.n,
        "extra_peak_mib": _number(measurement.extra_peak_mib),
        **common,
    }


def write_csv(path: Path, measurements: Sequence[Measurement], common: dict[str, object]) -> None:
    """Write all rows with a header; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row(m, common) for m in measurements)


def default_path() -> Path:
    """results/step-<UTC date and time>.csv, so that no run overwrites another."""
    return FOLDER / f"step-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.csv"


def size_text(size: Sequence[int]) -> str:
    """(96, 96, 96) -> "96x96x96"."""
    return "x".join(map(str, size))


def describe(case: Case) -> str:
    """One line about a case for people."""
    native = ", ".join(map(size_text, case.native))
    dtype = str(case.dtype).removeprefix("torch.")
    return (
        f"{case.name}: B={case.batch} C={case.classes} L={len(case.native)} {size_text(case.full)} {dtype}, "
        f"native {native}, {case.plan.num_maps} maps"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
